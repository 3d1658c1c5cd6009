//! The XSAVE area in its standard format (Intel SDM vol. 1, 13.4): the legacy
//! part, a header, then one component each at a place the processor tells.

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::LazyLock;

use crate::image::schema::{UserX86FpregsEntry, UserX86XsaveEntry};

/// Offsets in the legacy part (13.4.1) and the header (13.4.2).
const RIP: usize = 8;
const RDP: usize = 16;
const MXCSR: usize = 24;
const ST_SPACE: Range<usize> = 32..160;
const XMM_SPACE: Range<usize> = 160..416;
const PADDING: Range<usize> = 416..464;
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;
/// x87 and SSE, which the legacy part holds.
const LEGACY: u64 = 0b11;

/// Components that the common schema has a field for.
const YMM: u32 = 2;
const BNDREGS: u32 = 3;
const BNDCSR: u32 = 4;
const OPMASK: u32 = 5;
const ZMM_UPPER: u32 = 6;
const HI16_ZMM: u32 = 7;
const PKRU: u32 = 9;
/// More than the highest of them.
const COMPONENTS: usize = 10;

/// Where a component lies; `None`: this processor has none.
fn place(component: u32) -> Option<Range<usize>> {
    // Asked once: in a virtual machine each CPUID is an exit.
    static PLACES: LazyLock<[Option<Range<usize>>; COMPONENTS]> =
        LazyLock::new(|| std::array::from_fn(|component| ask_place(component as u32)));
    PLACES.get(component as usize)?.clone()
}

fn ask_place(component: u32) -> Option<Range<usize>> {
    const XSAVE_LEAF: u32 = 0xd;
    let r = __cpuid_count(XSAVE_LEAF, component);
    let (offset, size) = (r.ebx as usize, r.eax as usize);
    (size != 0 && offset >= HEADER_END).then(|| offset..offset + size)
}

/// The parts of an area that the common schema names.
pub fn to_entry(area: &[u8]) -> UserX86FpregsEntry {
    let u16_at = |o: usize| u32::from(u16::from_le_bytes([area[o], area[o + 1]]));
    let xsave = (area.len() >= HEADER_END).then(|| {
        let bytes = |component| {
            place(component)
                .and_then(|r| area.get(r))
                .unwrap_or_default()
        };
        UserX86XsaveEntry {
            xstate_bv: words64(&area[XSTATE_BV..XSTATE_BV + 8])[0],
            ymmh_space: words32(bytes(YMM)),
            bndreg_state: words64(bytes(BNDREGS)),
            bndcsr_state: words64(bytes(BNDCSR)),
            opmask_reg: words64(bytes(OPMASK)),
            zmm_upper: words64(bytes(ZMM_UPPER)),
            hi16_zmm: words64(bytes(HI16_ZMM)),
            pkru: words32(bytes(PKRU)),
            cet: None,
        }
    });
    UserX86FpregsEntry {
        cwd: u16_at(0),
        swd: u16_at(2),
        twd: u16_at(4),
        fop: u16_at(6),
        rip: words64(&area[RIP..RIP + 8])[0],
        rdp: words64(&area[RDP..RDP + 8])[0],
        mxcsr: words32(&area[MXCSR..MXCSR + 4])[0],
        mxcsr_mask: words32(&area[MXCSR + 4..MXCSR + 8])[0],
        st_space: words32(&area[ST_SPACE]),
        xmm_space: words32(&area[XMM_SPACE]),
        padding: words32(&area[PADDING]),
        xsave,
    }
}

/// An area with what the common schema says. `None`: it uses a component that
/// this processor does not have, or that the schema has no field for.
pub fn from_entry(e: &UserX86FpregsEntry) -> Option<Vec<u8>> {
    let mut area = vec![0; HEADER_END];
    for (at, word) in [(0, e.cwd), (2, e.swd), (4, e.twd), (6, e.fop)] {
        area[at..at + 2].copy_from_slice(&(word as u16).to_le_bytes());
    }
    area[RIP..RIP + 8].copy_from_slice(&e.rip.to_le_bytes());
    area[RDP..RDP + 8].copy_from_slice(&e.rdp.to_le_bytes());
    area[MXCSR..MXCSR + 4].copy_from_slice(&e.mxcsr.to_le_bytes());
    area[MXCSR + 4..MXCSR + 8].copy_from_slice(&e.mxcsr_mask.to_le_bytes());
    put(&mut area, ST_SPACE, &bytes32(&e.st_space));
    put(&mut area, XMM_SPACE, &bytes32(&e.xmm_space));
    let mut present = LEGACY;
    if let Some(x) = &e.xsave {
        let components = [
            (YMM, bytes32(&x.ymmh_space)),
            (BNDREGS, bytes64(&x.bndreg_state)),
            (BNDCSR, bytes64(&x.bndcsr_state)),
            (OPMASK, bytes64(&x.opmask_reg)),
            (ZMM_UPPER, bytes64(&x.zmm_upper)),
            (HI16_ZMM, bytes64(&x.hi16_zmm)),
            (PKRU, bytes32(&x.pkru)),
        ];
        let known = components.iter().fold(LEGACY, |a, (c, _)| a | 1 << c);
        if x.xstate_bv & !known != 0 {
            return None;
        }
        present = x.xstate_bv;
        for (component, bytes) in components {
            if present >> component & 1 == 0 {
                continue;
            }
            let range = place(component)?;
            if area.len() < range.end {
                area.resize(range.end, 0);
            }
            put(&mut area, range, &bytes);
        }
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
    Some(area)
}

/// Copies as much as there is and has room.
fn put(area: &mut [u8], range: Range<usize>, bytes: &[u8]) {
    let n = range.len().min(bytes.len());
    area[range.start..range.start + n].copy_from_slice(&bytes[..n]);
}

fn words32(bytes: &[u8]) -> Vec<u32> {
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("4 bytes"));
    bytes.chunks_exact(4).map(word).collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("8 bytes"));
    bytes.chunks_exact(8).map(word).collect()
}

fn bytes32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn bytes64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_survives_the_common_schema() {
        let ymm = place(YMM);
        let len = ymm.as_ref().map_or(HEADER_END, |r| r.end);
        let mut area: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        // What the hardware keeps for itself is not carried.
        area[PADDING.start..XSTATE_BV].fill(0);
        area[XSTATE_BV..HEADER_END].fill(0);
        area[XSTATE_BV] = if ymm.is_some() { 0b111 } else { 0b11 };
        assert_eq!(from_entry(&to_entry(&area)).as_deref(), Some(&area[..]));
    }

    #[test]
    fn an_unknown_component_is_no_area() {
        let mut e = to_entry(&[0; HEADER_END]);
        e.xsave.as_mut().expect("long enough").xstate_bv = 1 << 18;
        assert_eq!(from_entry(&e), None);
    }
}
