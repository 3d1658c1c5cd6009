//! `criu cpuinfo`: what the processor can, written down and compared.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use anyhow::{Context, bail};
use rcr_engine::image::schema::{CpuinfoEntry, CpuinfoX86Entry, Vendor};
use rcr_engine::image::{DirSource, Kind, get_record, write_image};

use super::Error;
use super::options::Options;
use super::places::Places;

/// What is written down.
pub const IMAGE: &str = "cpuinfo.img";
/// Version of the list of capability words: the kernel's numbering of 20.
const CAPABILITY_VERSION: u32 = 2;
const WORDS: usize = 20;

/// Writes `cpuinfo.img`.
pub fn dump(options: &Options) -> Result<(), Error> {
    let places = Places::open(options)?;
    write(&places)
}

/// Writes `cpuinfo.img` into the images' directory.
pub fn write(places: &Places) -> Result<(), Error> {
    let entry = CpuinfoEntry {
        x86_entry: vec![here()],
        ..CpuinfoEntry::default()
    };
    let path = places.images.join(IMAGE);
    std::fs::write(&path, write_image(Kind::Cpuinfo, &[entry]))
        .with_context(|| path.display().to_string())
}

/// Compares this processor with that of `cpuinfo.img`.
pub fn check(options: &Options) -> Result<(), Error> {
    let places = Places::open(options)?;
    compare(&places, options.cpu_cap.as_deref())
}

/// Compares; `mode` is what `--cpu-cap` says.
pub fn compare(places: &Places, mode: Option<&str>) -> Result<(), Error> {
    let source = DirSource::open(&places.images)?;
    let entry: CpuinfoEntry = get_record(&source, Kind::Cpuinfo, IMAGE)?;
    let there = entry.x86_entry.first().context("no x86 processor in it")?;
    fits(there, &here(), mode.unwrap_or("fpu,ins"))
}

fn fits(there: &CpuinfoX86Entry, here: &CpuinfoX86Entry, mode: &str) -> Result<(), Error> {
    let asked = |what| mode.split(',').any(|m| m == what || m == "all");
    if mode.split(',').any(|m| m == "none") {
        return Ok(());
    }
    let named = |words: &[u32]| -> Vec<u32> {
        let hardware = |i: &usize| !SOFTWARE.contains(i);
        (0..WORDS)
            .filter(hardware)
            .map(|i| words.get(i).copied().unwrap_or(0))
            .collect()
    };
    let (old, new) = (named(&there.capability), named(&here.capability));
    if asked("cpu") && old != new {
        bail!("the processor's capabilities differ");
    }
    if asked("ins") && old.iter().zip(&new).any(|(o, n)| o & !n != 0) {
        bail!("the processor lacks instructions that were there at the dump");
    }
    let lacks = there.xfeatures_mask.unwrap_or(0) & !here.xfeatures_mask.unwrap_or(0);
    if asked("fpu") && lacks != 0 {
        bail!("the processor lacks register state {lacks:#x}");
    }
    Ok(())
}

/// Words that the kernel fills by itself.
const SOFTWARE: [usize; 5] = [2, 3, 7, 8, 11];

fn here() -> CpuinfoX86Entry {
    let vendor = __cpuid(0);
    let id = __cpuid(1);
    let highest = vendor.eax;
    let extended = __cpuid(0x8000_0000).eax;
    let leaf = |n: u32, sub: u32| {
        let max = if n >= 0x8000_0000 { extended } else { highest };
        (n <= max).then(|| __cpuid_count(n, sub))
    };
    // arch/x86/include/asm/cpufeatures.h of Linux.
    let mut words = [0; WORDS];
    words[0] = id.edx;
    words[1] = leaf(0x8000_0001, 0).map_or(0, |r| r.edx);
    words[4] = id.ecx;
    words[6] = leaf(0x8000_0001, 0).map_or(0, |r| r.ecx);
    words[9] = leaf(7, 0).map_or(0, |r| r.ebx);
    words[10] = leaf(0xd, 1).map_or(0, |r| r.eax);
    words[12] = leaf(7, 1).map_or(0, |r| r.eax);
    words[13] = leaf(0x8000_0008, 0).map_or(0, |r| r.ebx);
    words[14] = leaf(6, 0).map_or(0, |r| r.eax);
    words[15] = leaf(0x8000_000a, 0).map_or(0, |r| r.edx);
    words[16] = leaf(7, 0).map_or(0, |r| r.ecx);
    words[17] = leaf(0x8000_0007, 0).map_or(0, |r| r.ebx);
    words[18] = leaf(7, 0).map_or(0, |r| r.edx);
    words[19] = leaf(0x8000_001f, 0).map_or(0, |r| r.eax);
    // Not the processor's: which core this runs on, whether the system uses it.
    words[4] &= !(1 << 27);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let vendor_id = match name.as_flattened() {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" => Vendor::Amd,
        _ => Vendor::Unknown,
    };
    let base_family = id.eax >> 8 & 0xf;
    let family = base_family
        + if base_family == 0xf {
            id.eax >> 20 & 0xff
        } else {
            0
        };
    let model = id.eax >> 4 & 0xf
        | if base_family >= 6 {
            (id.eax >> 16 & 0xf) << 4
        } else {
            0
        };
    let xsave = leaf(0xd, 0);
    CpuinfoX86Entry {
        vendor_id: vendor_id as i32,
        cpu_family: family,
        model,
        stepping: id.eax & 0xf,
        capability_ver: CAPABILITY_VERSION,
        capability: words.to_vec(),
        model_id: None,
        xfeatures_mask: xsave.map(|r| u64::from(r.eax) | u64::from(r.edx) << 32),
        xsave_size: xsave.map(|r| r.ebx),
        xsave_size_max: xsave.map(|r| r.ecx),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesser_processor_is_told_apart() {
        let now = here();
        fits(&now, &now, "all").unwrap();
        let mut more = now.clone();
        more.capability[9] = u32::MAX;
        more.xfeatures_mask = Some(u64::MAX);
        for mode in ["fpu", "ins", "cpu", "all", "fpu,ins"] {
            assert!(fits(&more, &now, mode).is_err(), "{mode}");
        }
        fits(&more, &now, "none").unwrap();
        assert!(fits(&now, &more, "cpu").is_err());
        fits(&now, &more, "ins").unwrap();
    }
}
