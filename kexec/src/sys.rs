//! System calls that no library has.

use std::io;

/// `KEXEC_ARCH_X86_64`: the machine number of ELF in the upper half.
const KEXEC_ARCH_X86_64: libc::c_ulong = 62 << 16;

/// `struct kexec_segment` of linux/kexec.h.
#[repr(C)]
struct KexecSegment {
    buf: *const libc::c_void,
    bufsz: usize,
    mem: *const libc::c_void,
    memsz: usize,
}

/// What goes to one stretch of physical memory.
pub(crate) struct Piece<'a> {
    pub bytes: &'a [u8],
    pub address: u64,
    pub memory_len: u64,
}

/// kexec_load(2). Without pieces, unloads.
pub(crate) fn kexec_load(entry: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
    let segments: Vec<KexecSegment> = pieces
        .iter()
        .map(|piece| KexecSegment {
            buf: piece.bytes.as_ptr().cast(),
            bufsz: piece.bytes.len(),
            mem: piece.address as *const libc::c_void,
            memsz: piece.memory_len as usize,
        })
        .collect();
    // SAFETY: the kernel reads `segments` and, through it, slices that outlive the call; it
    // writes to nothing of this process. The physical addresses matter only at the jump.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_load,
            entry,
            segments.len(),
            segments.as_ptr(),
            KEXEC_ARCH_X86_64,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Fills `out` by getrandom(2).
pub(crate) fn entropy(out: &mut [u8; 32]) -> io::Result<()> {
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    let got = unsafe { libc::getrandom(out.as_mut_ptr().cast(), out.len(), 0) };
    // Requests of up to 256 bytes are never cut short.
    if got == out.len() as isize {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
