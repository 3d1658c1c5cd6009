//! Layout figures of an address space: code, data, heap, stack, arguments,
//! auxiliary vector, executable (prctl(2), PR_SET_MM_MAP).

use crate::image::schema::MmEntry;
use crate::remote::{OpId, Program};
use crate::sys::text;
use crate::tree::Stat;

use super::MemoryError;

const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: i32 = 14;
/// Where the executable's descriptor lies for a moment, while the table holds
/// nothing of the process yet.
const EXE_FD: i32 = 900;
/// Bytes of `struct prctl_mm_map`.
const MM_MAP_BYTES: usize = 104;

/// Reads what `/proc` tells; mappings, heap end and executable come later.
pub fn save(pid: i32) -> Result<MmEntry, MemoryError> {
    let stat = Stat::read(pid).map_err(MemoryError::io(format!("stat of {pid}")))?;
    let auxv = text::read(format!("/proc/{pid}/auxv"))
        .map_err(MemoryError::io(format!("auxv of {pid}")))?;
    let words: Vec<u64> = auxv
        .chunks_exact(8)
        .map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")))
        .collect();
    // AT_NULL ends it; the kernel puts that behind whatever it is given.
    let pairs = words.chunks_exact(2).take_while(|pair| pair[0] != 0);
    Ok(MmEntry {
        mm_start_code: stat.number(26),
        mm_end_code: stat.number(27),
        mm_start_stack: stat.number(28),
        mm_start_data: stat.number(45),
        mm_end_data: stat.number(46),
        mm_start_brk: stat.number(47),
        mm_arg_start: stat.number(48),
        mm_arg_end: stat.number(49),
        mm_env_start: stat.number(50),
        mm_env_end: stat.number(51),
        mm_saved_auxv: pairs.flatten().copied().collect(),
        ..MmEntry::default()
    })
}

/// Sets all figures at once; the old executable must not be mapped any more
/// unless it stays (`None`).
pub fn restore(p: &mut Program, mm: &MmEntry, exe: Option<OpId>) {
    let auxv: Vec<u8> = mm
        .mm_saved_auxv
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    let auxv_len = auxv.len() as u32;
    let auxv = p.bytes(&auxv);
    let map = p.zeroed(MM_MAP_BYTES);
    let words = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
    ];
    p.write(map, 0, &words.map(u64::to_le_bytes).concat());
    p.point(map, 88, auxv);
    p.write(map, 96, &auxv_len.to_le_bytes());
    // The number has to stand in the struct, so it is a chosen one.
    let number = exe.map_or(-1, |_| EXE_FD);
    p.write(map, 100, &number.to_le_bytes());
    if let Some(exe) = exe {
        p.call(
            libc::SYS_dup3,
            "place the executable's descriptor",
            &[exe.into(), EXE_FD.into(), 0.into()],
        );
    }
    p.call(
        libc::SYS_prctl,
        "set the layout figures and the executable",
        &[
            PR_SET_MM.into(),
            PR_SET_MM_MAP.into(),
            map.into(),
            (MM_MAP_BYTES as u64).into(),
            0.into(),
        ],
    );
    if exe.is_some() {
        p.call(libc::SYS_close, "close the executable", &[EXE_FD.into()]);
    }
}
