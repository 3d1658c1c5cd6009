//! Images changed as if another kernel had written them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use rcr_engine::ext::{self, RcrInventory};
use rcr_engine::image::schema::{MmEntry, PagemapEntry, PagemapHead};
use rcr_engine::image::{
    DirSource, ImageReader, ImageSource, Kind, get_record, names, write_image,
};
use rcr_engine::memory::pages::PRESENT;
use rcr_engine::memory::vma::status;

/// How much older than this kernel the forged one pretends to be, nanoseconds.
pub const AGE_NS: i64 = 5_000_000_000_000;

/// What is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forge {
    /// The boot id is another and the clocks were [`AGE_NS`] further.
    Boot,
    /// The vDSO's text is another one.
    Vdso,
}

impl Forge {
    /// Changes the images of process `pid` in `dir`.
    pub fn apply(self, dir: &Path, pid: i32) -> Result<()> {
        match self {
            Forge::Boot => boot(dir),
            Forge::Vdso => vdso(dir, pid),
        }
    }
}

fn boot(dir: &Path) -> Result<()> {
    let source = DirSource::open(dir)?;
    let mut own: RcrInventory = get_record(&source, Kind::RcrTasks, ext::INVENTORY)?;
    drop(source);
    own.boot_id = "00000000-0000-4000-8000-000000000000".into();
    own.monotonic_ns += AGE_NS;
    own.boottime_ns += AGE_NS;
    let path = dir.join(ext::INVENTORY);
    Ok(std::fs::write(path, write_image(Kind::RcrTasks, &[own]))?)
}

/// Changes the last byte of the vDSO's text, which no function reaches.
fn vdso(dir: &Path, pid: i32) -> Result<()> {
    let source = DirSource::open(dir)?;
    let mm: MmEntry = get_record(&source, Kind::Mm, &names::mm(pid))?;
    let is_text = |e: &&_| -> bool {
        let e: &&rcr_engine::image::schema::VmaEntry = e;
        e.status & status::VDSO != 0
    };
    let text = mm.vmas.iter().find(is_text).context("no vDSO")?;
    let map = names::pagemap(pid);
    let bytes = source.get(&map)?.context("no pagemap")?;
    let mut reader = ImageReader::new(&map, Kind::Pagemap, bytes)?;
    let head: PagemapHead = reader.record()?.context("no head")?;
    let mut at = 0_u64;
    while let Some(e) = reader.record::<PagemapEntry>()? {
        let len = pages(&e) * 4096;
        if (e.vaddr..e.vaddr + len).contains(&(text.end - 1)) {
            let path = dir.join(names::pages(head.pages_id));
            let offset = at + (text.end - 1 - e.vaddr);
            drop(source);
            return flip(&path, offset);
        }
        if e.flags.is_none_or(|flags| flags & PRESENT != 0) {
            at += len;
        }
    }
    bail!("the vDSO is not in the images");
}

fn pages(e: &PagemapEntry) -> u64 {
    e.nr_pages.unwrap_or(u64::from(e.compat_nr_pages))
}

fn flip(path: &Path, offset: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    byte[0] ^= 0xff;
    Ok(file.write_all_at(&byte, offset)?)
}
