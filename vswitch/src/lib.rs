//! A userspace virtual switch with vhost-user, tap and in-process ports.
