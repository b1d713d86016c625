//! The channel on which a front-end is told of changes (vhost-user specification, "Back-end communication").
#![expect(unsafe_code, reason = "descriptors that arrive with a message become owned ones")]

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Version 1 of the protocol, no reply wanted.
const FLAGS: u32 = 1;

/// Where to tell a front-end of changes, if it wants to know.
#[derive(Default)]
pub struct Channel(Option<OwnedFd>);

impl Channel {
    /// Waits for a message on a connection, and takes the channel from it if it brings one. The message stays where it
    /// is: the protocol's library handles it too, but keeps the descriptor to itself and has no call for this use of it.
    pub fn peek(connection: &UnixStream) -> Option<Self> {
        let socket = connection.as_raw_fd();
        let mut request = [0; 4];
        let len = recv(socket, &mut request, MsgFlags::MSG_PEEK).ok()?;
        let wanted = u32::from(FrontendReq::SET_BACKEND_REQ_FD);
        if len < request.len() || u32::from_ne_bytes(request) != wanted {
            return None;
        }
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let mut bytes = [IoSliceMut::new(&mut request)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket, &mut bytes, Some(&mut space), flags).ok()?;
        let mut channel = None;
        for control in message.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                for descriptor in descriptors {
                    // SAFETY: the kernel made this descriptor for this call, and nobody else knows it.
                    channel = Some(unsafe { OwnedFd::from_raw_fd(descriptor) });
                }
            }
        }
        Some(Channel(channel))
    }

    /// Tells the front-end to look at the configuration space.
    pub fn config_changed(&self) {
        let Some(channel) = &self.0 else { return };
        let header = [u32::from(BackendReq::CONFIG_CHANGE_MSG), FLAGS, 0].map(u32::to_ne_bytes).concat();
        // A front-end that has not read what was sent before will look later than now.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        if let Err(error) = send(channel.as_raw_fd(), &header, flags) {
            tracing::debug!(%error, "A front-end was not told of a change");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    fn message(request: FrontendReq) -> Vec<u8> {
        [u32::from(request), FLAGS, 0].map(u32::to_ne_bytes).concat()
    }

    #[test]
    fn the_channel_is_taken_from_its_message_only_and_the_message_stays() {
        let (mut front, mut back) = UnixStream::pair().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        front.write_all(&message(FrontendReq::SET_OWNER)).unwrap();
        assert!(Channel::peek(&back).is_none());
        let mut bytes = [0; 12];
        back.read_exact(&mut bytes).unwrap();
        front.send_with_fd(&message(FrontendReq::SET_BACKEND_REQ_FD)[..], theirs.as_raw_fd()).unwrap();
        drop(theirs);
        let channel = Channel::peek(&back).unwrap();
        back.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..], message(FrontendReq::SET_BACKEND_REQ_FD));
        channel.config_changed();
        ours.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        drop(channel);
        assert_eq!(ours.read(&mut bytes).unwrap(), 0, "the descriptor is closed");
    }

    #[test]
    fn a_front_end_that_does_not_read_holds_nothing_up() {
        let (front, back) = UnixStream::pair().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        front.send_with_fd(&message(FrontendReq::SET_BACKEND_REQ_FD)[..], theirs.as_raw_fd()).unwrap();
        let channel = Channel::peek(&back).unwrap();
        for _ in 0..100_000 {
            channel.config_changed();
        }
        drop(ours);
        channel.config_changed(); // nor does one that has gone raise a signal
    }
}
