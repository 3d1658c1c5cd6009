//! Loads a kernel as kexec-tools does: `rcr-plain-kexec KERNEL INITRD`, with the
//! running kernel's command line.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let mut open = || -> Result<File> {
        let path = args
            .next()
            .context("usage: rcr-plain-kexec KERNEL INITRD")?;
        File::open(&path).with_context(|| path.display().to_string())
    };
    let (kernel, initrd) = (open()?, open()?);
    let line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let line = CString::new(line.trim()).context("/proc/cmdline")?;
    // SAFETY: both descriptors are open, and the command line, with its final
    // zero, is as long as is said (kexec_file_load(2)).
    let done = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            line.as_bytes_with_nul().len(),
            line.as_ptr(),
            0,
        )
    };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("kexec_file_load");
    }
    Ok(())
}
