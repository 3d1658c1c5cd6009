//! Registers of threads that run while they are dumped.

use std::arch::asm;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};

use crate::conformance::sys;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "threads/registers",
        "x87, SSE and AVX registers of running threads",
        registers,
    ),
    Case::new(
        "threads/spinning",
        "general registers and flags of a running loop",
        spinning,
    ),
];

/// Shared with loops in assembly: `stop` at offset 0, `turns` at 8.
#[repr(C, align(64))]
struct Loop {
    stop: AtomicU64,
    turns: AtomicU64,
    out: [AtomicU64; 64],
}

impl Loop {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            out: [const { AtomicU64::new(0) }; 64],
        })
    }

    fn out(&self) -> Vec<u64> {
        self.out.iter().map(|w| w.load(Ordering::SeqCst)).collect()
    }
}

/// Starts `body` in a thread; it loops until told to stop.
fn running(body: fn(&Loop)) -> (Arc<Loop>, JoinHandle<()>) {
    let shared = Loop::new();
    let theirs = shared.clone();
    let join = thread::spawn(move || body(&theirs));
    sys::await_word(&shared.turns, 1000);
    (shared, join)
}

/// Values in registers, a loop that leaves them alone, values out.
fn sse_loop(l: &Loop) {
    let values: [u64; 16] = std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
    // SAFETY: reads 128 bytes of `values`, writes 128 of `out`, counts in
    // `turns`; all registers it changes are declared.
    unsafe {
        asm!(
            "movups xmm8, [{v}]", "movups xmm9, [{v}+16]", "movups xmm10, [{v}+32]",
            "movups xmm11, [{v}+48]", "movups xmm12, [{v}+64]", "movups xmm13, [{v}+80]",
            "movups xmm14, [{v}+96]", "movups xmm15, [{v}+112]",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "movups [{o}], xmm8", "movups [{o}+16], xmm9", "movups [{o}+32], xmm10",
            "movups [{o}+48], xmm11", "movups [{o}+64], xmm12", "movups [{o}+80], xmm13",
            "movups [{o}+96], xmm14", "movups [{o}+112], xmm15",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
}

#[target_feature(enable = "avx")]
fn avx_inner(l: &Loop) {
    let values: [u64; 32] = std::array::from_fn(|i| 0x1111_2222_3333_4400 + i as u64);
    // SAFETY: as in `sse_loop`, with 256 bytes each way.
    unsafe {
        asm!(
            "vmovups ymm8, [{v}]", "vmovups ymm9, [{v}+32]", "vmovups ymm10, [{v}+64]",
            "vmovups ymm11, [{v}+96]", "vmovups ymm12, [{v}+128]", "vmovups ymm13, [{v}+160]",
            "vmovups ymm14, [{v}+192]", "vmovups ymm15, [{v}+224]",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "vmovups [{o}], ymm8", "vmovups [{o}+32], ymm9", "vmovups [{o}+64], ymm10",
            "vmovups [{o}+96], ymm11", "vmovups [{o}+128], ymm12", "vmovups [{o}+160], ymm13",
            "vmovups [{o}+192], ymm14", "vmovups [{o}+224], ymm15",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
}

fn avx_loop(l: &Loop) {
    // SAFETY: started only where the processor has AVX.
    unsafe { avx_inner(l) }
}

#[target_feature(enable = "avx512f")]
fn avx512_inner(l: &Loop) {
    let values: [u64; 32] = std::array::from_fn(|i| 0x5555_6666_7777_8800 + i as u64);
    // SAFETY: as in `sse_loop`; a mask register on top.
    unsafe {
        asm!(
            "vmovups zmm16, [{v}]", "vmovups zmm17, [{v}+64]", "vmovups zmm30, [{v}+128]",
            "vmovups zmm31, [{v}+192]", "mov {t:e}, 0xa55a", "kmovw k3, {t:e}",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "vmovups [{o}], zmm16", "vmovups [{o}+64], zmm17", "vmovups [{o}+128], zmm30",
            "vmovups [{o}+192], zmm31", "kmovw {t:e}, k3", "mov [{o}+256], {t}",
            v = in(reg) values.as_ptr(), l = in(reg) l, o = in(reg) l.out.as_ptr(),
            t = out(reg) _,
            out("zmm16") _, out("zmm17") _, out("zmm30") _, out("zmm31") _, out("k3") _,
        );
    }
}

fn avx512_loop(l: &Loop) {
    // SAFETY: started only where the processor has AVX-512.
    unsafe { avx512_inner(l) }
}

/// Three numbers on the x87 stack, and control words that are not the usual.
fn x87_loop(l: &Loop) {
    let (control, mxcsr) = (0x0f7f_u16, 0x5f80_u32);
    let (usual_control, usual_mxcsr) = (0x037f_u16, 0x1f80_u32);
    // SAFETY: leaves the x87 stack empty and the control words as usual.
    unsafe {
        asm!(
            "fldcw word ptr [{c}]", "ldmxcsr dword ptr [{m}]",
            "fldpi", "fldl2e", "fldl2t",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "fstp tbyte ptr [{o}]", "fstp tbyte ptr [{o}+16]", "fstp tbyte ptr [{o}+32]",
            "fnstcw word ptr [{o}+48]", "stmxcsr dword ptr [{o}+56]",
            "fldcw word ptr [{uc}]", "ldmxcsr dword ptr [{um}]",
            c = in(reg) &control, m = in(reg) &mxcsr,
            uc = in(reg) &usual_control, um = in(reg) &usual_mxcsr,
            l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _,
            out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

fn registers(_: &Stage) -> Result<Check> {
    type Body = (&'static str, fn(&Loop));
    let mut bodies: Vec<Body> = vec![("SSE", sse_loop), ("x87", x87_loop)];
    if std::is_x86_feature_detected!("avx") {
        bodies.push(("AVX", avx_loop));
    }
    if std::is_x86_feature_detected!("avx512f") {
        bodies.push(("AVX-512", avx512_loop));
    }
    // What a loop gives that is not disturbed.
    let mut expected = Vec::new();
    for (name, body) in &bodies {
        let (l, join) = running(*body);
        l.stop.store(1, Ordering::SeqCst);
        ensure!(join.join().is_ok(), "{name}");
        expected.push(l.out());
    }
    let start = move |bodies: &[Body]| bodies.iter().map(|b| running(b.1)).collect::<Vec<_>>();
    let mut loops = start(&bodies);
    Ok(Box::new(move |f| {
        for (((l, join), want), (name, _)) in loops.drain(..).zip(&expected).zip(&bodies) {
            l.stop.store(1, Ordering::SeqCst);
            f.that(format!("{name}: the thread ended"), join.join().is_ok());
            f.same(&format!("{name} registers"), want, &l.out());
        }
        loops = start(&bodies);
        Ok(())
    }))
}

fn general_loop(l: &Loop) {
    // SAFETY: counts in `turns`, writes 8 words and the flags to `out`; the
    // direction flag is clear again at the end.
    unsafe {
        asm!(
            "mov r8, 0x1001", "mov r9, 0x1002", "mov r10, 0x1003", "mov r11, 0x1004",
            "mov r12, 0x1005", "mov r13, 0x1006", "mov r14, 0x1007", "mov r15, -8",
            "std",
            "2:", "inc qword ptr [{l}+8]", "cmp qword ptr [{l}], 0", "je 2b",
            "mov [{o}], r8", "mov [{o}+8], r9", "mov [{o}+16], r10", "mov [{o}+24], r11",
            "mov [{o}+32], r12", "mov [{o}+40], r13", "mov [{o}+48], r14", "mov [{o}+56], r15",
            "pushfq", "pop r8", "and r8, 0x400", "mov [{o}+64], r8", "cld",
            l = in(reg) l, o = in(reg) l.out.as_ptr(),
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}

fn spinning(_: &Stage) -> Result<Check> {
    let mut want: Vec<u64> = (0x1001..0x1008).collect();
    want.extend([(-8_i64) as u64, 0x400]);
    let mut current = Some(running(general_loop));
    Ok(Box::new(move |f| {
        let (l, join) = current.take().context("a loop")?;
        let turns = l.turns.load(Ordering::SeqCst);
        sys::await_word(&l.turns, turns + 1);
        l.stop.store(1, Ordering::SeqCst);
        f.that("the thread ended", join.join().is_ok());
        f.same("registers", &want[..], &l.out()[..9]);
        current = Some(running(general_loop));
        Ok(())
    }))
}
