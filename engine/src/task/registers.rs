//! Registers: general purpose, x87/SSE and the XSAVE area.

use crate::arch::xstate;
use crate::image::schema::{UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode};
use crate::sys::ptrace::Regs;

/// Registers to their image form.
pub fn save(r: &Regs) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: Some(UserX86RegsMode::Native as i32),
    }
}

/// Registers from their image form.
pub fn load(e: &UserX86RegsEntry) -> Regs {
    Regs {
        r15: e.r15,
        r14: e.r14,
        r13: e.r13,
        r12: e.r12,
        rbp: e.bp,
        rbx: e.bx,
        r11: e.r11,
        r10: e.r10,
        r9: e.r9,
        r8: e.r8,
        rax: e.ax,
        rcx: e.cx,
        rdx: e.dx,
        rsi: e.si,
        rdi: e.di,
        orig_rax: e.orig_ax,
        rip: e.ip,
        cs: e.cs,
        eflags: e.flags,
        rsp: e.sp,
        ss: e.ss,
        fs_base: e.fs_base,
        gs_base: e.gs_base,
        ds: e.ds,
        es: e.es,
        fs: e.fs,
        gs: e.gs,
    }
}

/// A saved XSAVE area in the length that this kernel takes: one with other
/// processor features enabled has another length. `None`: the area uses a
/// feature that does not exist here.
pub fn fit_xstate(saved: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut area = saved.to_vec();
    if saved
        .get(len..)
        .is_some_and(|rest| rest.iter().any(|&b| b != 0))
    {
        return None;
    }
    area.resize(len, 0);
    Some(area)
}

/// The parts of the XSAVE area that the common schema names. The area as a
/// whole is kept apart, raw.
pub fn save_fp(area: &[u8]) -> UserX86FpregsEntry {
    xstate::to_entry(area)
}

#[cfg(test)]
mod tests {
    use super::fit_xstate;

    #[test]
    fn an_area_fits_a_kernel_with_more_or_fewer_features() {
        assert_eq!(fit_xstate(&[1, 2], 4), Some(vec![1, 2, 0, 0]));
        assert_eq!(fit_xstate(&[1, 2, 0, 0], 2), Some(vec![1, 2]));
        assert_eq!(fit_xstate(&[1, 2, 3, 0], 2), None);
    }
}
