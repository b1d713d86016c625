//! Leases, heartbeats, coordination, fencing, HA and placement for a cluster of hosts.
