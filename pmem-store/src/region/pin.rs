//! Keeping frames where they are: an io_uring registration of buffers pins them
//! (io_uring_register(2), `IORING_REGISTER_BUFFERS`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `IORING_REGISTER_BUFFERS` of linux/io_uring.h.
const REGISTER_BUFFERS: libc::c_uint = 0;
/// `IORING_UNREGISTER_BUFFERS` of linux/io_uring.h.
const UNREGISTER_BUFFERS: libc::c_uint = 1;
/// Bytes of `struct io_uring_params`.
const PARAMS_LEN: usize = 120;
/// The most that one registered buffer may have.
const BUFFER_MAX: usize = 1 << 30;

/// Frames stay where they are while this lives.
#[derive(Debug)]
pub(super) struct Pin {
    ring: OwnedFd,
}

impl Pin {
    /// Pins all pages of `memory`.
    ///
    /// The pins belong to the ring, not to the borrow: unmapping the memory first
    /// leaves the frames allocated until the pin goes.
    pub fn new(memory: &[u8]) -> io::Result<Pin> {
        let mut params = [0u8; PARAMS_LEN];
        // SAFETY: the kernel reads and writes one io_uring_params, which `params` has the
        // length of; the ring is neither mapped nor used.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        if ring < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel returned a new descriptor that nobody else owns.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let buffers: Vec<libc::iovec> = memory
            .chunks(BUFFER_MAX)
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_ptr() as *mut _,
                iov_len: chunk.len(),
            })
            .collect();
        // SAFETY: the vectors describe mapped memory; no request will ever use the buffers,
        // so the kernel does not write to them.
        let registered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                buffers.as_ptr(),
                buffers.len(),
            )
        };
        if registered < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Pin { ring })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Closing the ring would unpin too, but only some time later.
        // SAFETY: the call takes no memory.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.ring.as_raw_fd(),
                UNREGISTER_BUFFERS,
                0usize,
                0,
            )
        };
        if done < 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "unpinning a region failed");
        }
    }
}
