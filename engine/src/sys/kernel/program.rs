//! The programs, and the calls that load and run them: bpf(2), the kernel's
//! Documentation/bpf/standardization/instruction-set.rst.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::sys::{SysError, SysResult};

const PROG_LOAD: i64 = 5;
const LINK_CREATE: i64 = 28;
const ITER_CREATE: i64 = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;
const HELPER_PROBE_READ_KERNEL: i32 = 113;
const HELPER_SEQ_WRITE: i32 = 127;
/// How often a program is loaded before giving up.
const TRIES: usize = 20;
/// The helpers are for programs under a license like the kernel's.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

/// `union bpf_attr` as far as it is used.
type Attr = [u8; 120];

/// The frame pointer; what is below it is the program's own.
const FP: u8 = 10;

/// Instructions being put together.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn op(&mut self, code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> &mut Self {
        self.0.extend([code, dst | src << 4]);
        self.0.extend(offset.to_le_bytes());
        self.0.extend(imm.to_le_bytes());
        self
    }

    /// `dst = src`
    fn set(&mut self, dst: u8, src: u8) -> &mut Self {
        self.op(0xbf, dst, src, 0, 0)
    }

    /// `dst = imm`
    fn set_number(&mut self, dst: u8, imm: i32) -> &mut Self {
        self.op(0xb7, dst, 0, 0, imm)
    }

    /// `dst = address`
    fn set_address(&mut self, dst: u8, address: u64) -> &mut Self {
        self.op(0x18, dst, 0, 0, address as u32 as i32);
        self.op(0, 0, 0, 0, (address >> 32) as u32 as i32)
    }

    /// `dst = fp - below`
    fn set_own(&mut self, dst: u8, below: i32) -> &mut Self {
        self.set(dst, FP).op(0x07, dst, 0, 0, -below)
    }

    /// `dst = *(u64 *)(src + offset)`
    fn load(&mut self, dst: u8, src: u8, offset: i16) -> &mut Self {
        self.op(0x79, dst, src, offset, 0)
    }

    /// `*(u64 *)(fp - below) = src`
    fn store(&mut self, below: i16, src: u8) -> &mut Self {
        self.op(0x7b, FP, src, -below, 0)
    }

    fn call(&mut self, helper: i32) -> &mut Self {
        self.op(0x85, 0, 0, 0, helper)
    }

    fn exit(&mut self) -> &mut Self {
        self.set_number(0, 0).op(0x95, 0, 0, 0, 0)
    }

    /// Begins: r6 is the context, r7 what the iterator is at, which is 0
    /// behind the last.
    fn begin(&mut self, at: i16) -> &mut Self {
        self.set(6, 1).load(7, 6, at);
        self.op(0x55, 7, 0, 2, 0).exit()
    }

    /// Puts out `len` bytes from `fp - below`.
    fn put(&mut self, below: i32, len: i32) -> &mut Self {
        self.load(1, 6, 0).load(1, 1, 0);
        self.set_own(2, below)
            .set_number(3, len)
            .call(HELPER_SEQ_WRITE)
    }
}

/// For `task_file`: number, file and `private_data` of each.
pub(super) fn files(private_data: i16) -> Vec<u8> {
    let mut c = Code::default();
    c.begin(24);
    // A number of 32 bits.
    c.op(0x61, 8, 6, 16, 0).store(24, 8).store(16, 7);
    c.load(8, 7, private_data).store(8, 8);
    c.put(24, 24).exit();
    c.0
}

/// For `task`: its address.
pub(super) fn task() -> Vec<u8> {
    let mut c = Code::default();
    c.begin(8).store(8, 7).put(8, 8).exit();
    c.0
}

/// For `task`: for each range whether it could be read, and what is there.
pub(super) fn copy(ranges: &[(u64, usize)]) -> Vec<u8> {
    let mut c = Code::default();
    c.begin(8);
    for &(at, len) in ranges {
        c.set_own(1, 256).set_number(2, len as i32);
        c.set_address(3, at).call(HELPER_PROBE_READ_KERNEL);
        c.store(264, 0).put(264, len as i32 + 8);
    }
    c.exit();
    c.0
}

/// For `task`: the number of nodes of a list, `most` at most, and the next one.
pub(super) fn follow(first: u64, most: usize) -> Vec<u8> {
    /// Instructions of one step.
    const STEP: usize = 8;
    let mut c = Code::default();
    c.begin(8).set_address(9, first).set_number(8, 0);
    for n in 0..most {
        let to_end = (most - n) * STEP - 1;
        c.op(0x15, 9, 0, to_end as i16, 0);
        c.op(0x07, 8, 0, 0, 1);
        c.set_own(1, 8).set_number(2, 8);
        c.set(3, 9).call(HELPER_PROBE_READ_KERNEL);
        c.load(9, FP, -8);
    }
    c.store(16, 8).store(8, 9).put(16, 16).exit();
    c.0
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Iterator(OwnedFd);

fn put(attr: &mut Attr, at: usize, bytes: &[u8]) {
    attr[at..at + bytes.len()].copy_from_slice(bytes);
}

/// # Safety
/// Addresses in `attr` are valid for what the command does with them.
unsafe fn bpf(command: i64, what: &'static str, attr: &Attr) -> SysResult<OwnedFd> {
    // SAFETY: `attr` has the size given and lives across the call; the rest is
    // up to the caller.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), attr.len()) };
    if r < 0 {
        return Err(SysError::last(what, "BPF iterator"));
    }
    // SAFETY: just given to us by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(r as i32) })
}

impl Iterator {
    /// Loads a program for the iterator whose function has that number.
    pub(super) fn load(target: u32, code: &[u8]) -> SysResult<Self> {
        let mut attr: Attr = [0; 120];
        put(&mut attr, 0, &PROG_TYPE_TRACING.to_ne_bytes());
        put(&mut attr, 4, &(code.len() as u32 / 8).to_ne_bytes());
        put(&mut attr, 8, &(code.as_ptr() as u64).to_ne_bytes());
        put(&mut attr, 16, &(LICENSE.as_ptr() as u64).to_ne_bytes());
        put(&mut attr, 48, b"rcr_look");
        put(&mut attr, 68, &TRACE_ITER.to_ne_bytes());
        put(&mut attr, 108, &target.to_ne_bytes());
        // Signals on their way end the kernel's examination of a program.
        for _ in 0..TRIES {
            // SAFETY: code and license live across the call and are only read.
            match unsafe { bpf(PROG_LOAD, "bpf(PROG_LOAD)", &attr) } {
                Err(e) if e.errno == nix::errno::Errno::EAGAIN => {}
                loaded => return Ok(Self(loaded?)),
            }
        }
        let errno = nix::errno::Errno::EAGAIN;
        Err(SysError::new("bpf(PROG_LOAD)", "BPF iterator", errno))
    }

    /// Runs it for one task and gives what it put out.
    pub(super) fn run(&self, tid: i32) -> SysResult<Vec<u8>> {
        // union bpf_iter_link_info: the task's id, 0, and a pidfd instead.
        let only = [tid as u32, 0, 0, 0];
        let mut attr: Attr = [0; 120];
        put(&mut attr, 0, &self.0.as_raw_fd().to_ne_bytes());
        put(&mut attr, 8, &TRACE_ITER.to_ne_bytes());
        put(&mut attr, 16, &(only.as_ptr() as u64).to_ne_bytes());
        put(
            &mut attr,
            24,
            &(std::mem::size_of_val(&only) as u32).to_ne_bytes(),
        );
        // SAFETY: the four numbers live across the call and are only read.
        let link = unsafe { bpf(LINK_CREATE, "bpf(LINK_CREATE)", &attr) }?;
        let mut attr: Attr = [0; 120];
        put(&mut attr, 0, &link.as_raw_fd().to_ne_bytes());
        // SAFETY: numbers only.
        let walk = unsafe { bpf(ITER_CREATE, "bpf(ITER_CREATE)", &attr) }?;
        let mut out = Vec::new();
        let failed = |e: std::io::Error| {
            let errno = nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            SysError::new("read", "BPF iterator", errno)
        };
        let mut walk = std::fs::File::from(walk);
        walk.read_to_end(&mut out).map_err(failed)?;
        Ok(out)
    }
}
