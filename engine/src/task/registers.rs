//! Registers: general purpose, x87/SSE and the XSAVE area.

use crate::image::schema::{
    UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode, UserX86XsaveEntry,
};
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

/// Offsets in the XSAVE area's legacy part (Intel SDM vol. 1, 13.4.1) and
/// header (13.4.2).
const MXCSR: usize = 24;
const ST_SPACE: std::ops::Range<usize> = 32..160;
const XMM_SPACE: std::ops::Range<usize> = 160..416;
const PADDING: std::ops::Range<usize> = 416..464;
const XSTATE_BV: usize = 512;
/// Where AVX's upper halves lie in the standard format, on every processor.
const YMMH: std::ops::Range<usize> = 576..832;

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
    let u16_at = |o: usize| u32::from(u16::from_le_bytes([area[o], area[o + 1]]));
    let u32_at = |o: usize| u32::from_le_bytes(area[o..o + 4].try_into().expect("4 bytes"));
    let u64_at = |o: usize| u64::from_le_bytes(area[o..o + 8].try_into().expect("8 bytes"));
    let words = |r: std::ops::Range<usize>| r.step_by(4).map(u32_at).collect::<Vec<_>>();
    let xsave = (area.len() >= YMMH.end).then(|| UserX86XsaveEntry {
        xstate_bv: u64_at(XSTATE_BV),
        ymmh_space: words(YMMH),
        ..UserX86XsaveEntry::default()
    });
    UserX86FpregsEntry {
        cwd: u16_at(0),
        swd: u16_at(2),
        twd: u16_at(4),
        fop: u16_at(6),
        rip: u64_at(8),
        rdp: u64_at(16),
        mxcsr: u32_at(MXCSR),
        mxcsr_mask: u32_at(MXCSR + 4),
        st_space: words(ST_SPACE),
        xmm_space: words(XMM_SPACE),
        padding: words(PADDING),
        xsave,
    }
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
