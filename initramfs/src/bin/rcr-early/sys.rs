//! System calls without a safe wrapper elsewhere.

use std::ffi::CString;
use std::io;

use nix::unistd::{ForkResult, Pid};

/// Loads a module (init_module(2)). One that is there already is well.
pub fn load_module(bytes: &[u8], options: &str) -> io::Result<()> {
    let options = CString::new(options).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads `bytes.len()` bytes and the NUL-terminated
    // string; both live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_init_module,
            bytes.as_ptr(),
            bytes.len(),
            options.as_ptr(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

/// Forks; the child runs `body` and exits with its result.
pub fn fork_worker(body: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: this process has one thread (nothing here starts another before
    // the fork), so the child may use everything.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
            std::process::exit(code)
        }
    }
}

/// Undoes what Rust's runtime does to SIGPIPE, for the program that comes next.
pub fn default_sigpipe() {
    // SAFETY: the default action is no handler that could be unsafe.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Sets the loopback interface up; the kernel gives it its addresses then.
pub fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    match unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
