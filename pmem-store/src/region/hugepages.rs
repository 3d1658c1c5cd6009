//! The old kernel's side: huge pages that fill whole memory blocks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount, umount};

use super::blocks::{FilePage, HUGE, choose, may_take, merge, whole_blocks};
use super::hotplug::{self, MovableBlocks};
use super::mapping::Mapping;
use super::pagemap::physical_addresses;
use super::pin::Pin;
use super::pool::{PoolShare, shrink_pool};
use super::region_error::{Context, RegionError};
use super::{Region, order_memory_writes, sysfs};
use crate::layout::Nonce;
use crate::locator::Locator;

/// What the next kernel can give back as RAM at the least.
const BLOCK_MIN: u64 = 128 << 20;
const FILE_NAME: &str = "store";
/// `st_blocks` counts in these.
const STAT_BLOCK: u64 = 512;

/// How to get a region.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where an own hugetlbfs is mounted.
    pub dir: PathBuf,
    /// Memory in bytes that stays available to the system beside the region, the
    /// loaded kernel and initrd included.
    pub spare_bytes: u64,
    /// Whether memory blocks may be emptied where free memory is too fragmented.
    pub defragment: bool,
    /// How long emptying one memory block may take.
    pub offline_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            dir: PathBuf::from("/run/rcr/region"),
            spare_bytes: 256 << 20,
            defragment: true,
            offline_limit: Duration::from_secs(5),
        }
    }
}

/// Memory whose physical addresses the next kernel can be told.
///
/// Its bytes ascend physically. Dropping it gives everything back as it was,
/// unless [`HugeRegion::keep`] was called: then the frames stay taken, by a file
/// in [`Options::dir`], until the kernel ends or [`HugeRegion::discard`]. When the
/// shutdown unmounts that folder, they stay in the kernel's pool of free huge
/// pages, whose content nothing changes before a program takes one.
#[derive(Debug)]
pub struct HugeRegion {
    // In the order of undoing: the file's pages go back to the pool before the pool
    // shrinks, and blocks are empty before they change their zone.
    mapping: Mapping,
    pin: Option<Pin>,
    file: RegionFile,
    pool: PoolShare,
    movable: MovableBlocks,
    pages: Vec<FilePage>,
}

impl HugeRegion {
    /// Takes at least `bytes` of memory, rounded up to memory blocks.
    ///
    /// # Errors
    /// [`RegionError::TooLittleMemory`], [`RegionError::Fragmented`],
    /// [`RegionError::InUse`] or what the system says; everything is then as before.
    pub fn allocate(bytes: u64, options: &Options) -> Result<HugeRegion, RegionError> {
        let block_len = hotplug::block_bytes()?.max(BLOCK_MIN);
        let wanted = bytes.div_ceil(block_len).max(1);
        let available = sysfs::meminfo("MemAvailable")?;
        if wanted
            .saturating_mul(block_len)
            .saturating_add(options.spare_bytes)
            > available
        {
            return Err(RegionError::TooLittleMemory {
                needed_mib: (wanted.saturating_mul(block_len)) >> 20,
                available_mib: available.saturating_sub(options.spare_bytes) >> 20,
                spare_mib: options.spare_bytes >> 20,
            });
        }
        let ram_end = hotplug::block_starts()?
            .last()
            .map_or(0, |start| start + block_len);

        // Dropped in reverse order on failure, which is the order of undoing as well.
        let mut movable = MovableBlocks::new(options.offline_limit);
        let mut pool = PoolShare::new();
        let mut file = RegionFile::create(&options.dir)?;
        let mut search = Search {
            block_len,
            ram_end,
            wanted,
            pages_max: (available - options.spare_bytes) / HUGE,
            pages: Vec::new(),
        };
        let mut chosen = search.grow(&mut file, &mut pool)?;
        if chosen.is_none() && options.defragment {
            search.release_others(&file, &mut pool)?;
            let missing = wanted - search.blocks().len() as u64;
            // Others allocate from emptied blocks too, so some do not fill.
            let asked = missing + missing.div_ceil(3);
            let converted = movable.convert(&search.candidates()?, asked)?;
            tracing::info!(
                missing,
                converted,
                "memory is fragmented; memory blocks were emptied"
            );
            chosen = search.grow(&mut file, &mut pool)?;
        }
        let Some(chosen) = chosen else {
            let found = search.blocks().len() as u64;
            return Err(RegionError::Fragmented {
                wanted,
                found,
                block_mib: block_len >> 20,
            });
        };
        let mut blocks = search.blocks();
        let pages: Vec<FilePage> = chosen
            .iter()
            .flat_map(|start| blocks.remove(start).unwrap_or_default())
            .collect();
        search.release_all_but(&pages, &file, &mut pool)?;
        let mapping = file.map(&pages)?;
        let mut region = HugeRegion {
            mapping,
            pin: None,
            file,
            pool,
            movable,
            pages,
        };
        region.recheck_pfns()?;
        region.pin_where_possible()?;
        Ok(region)
    }

    /// Reads the physical addresses once more, for instance after a kernel was loaded.
    ///
    /// # Errors
    /// [`RegionError::Moved`]: the region's locator is no longer true.
    pub fn recheck_pfns(&self) -> Result<(), RegionError> {
        let addresses = physical_addresses(self.mapping.bytes())
            .doing(|| "reading /proc/self/pagemap".to_owned())?;
        match self
            .pages
            .iter()
            .zip(&addresses)
            .find(|(page, now)| page.phys != **now)
        {
            Some((page, &now)) => Err(RegionError::Moved {
                was: page.phys,
                now,
            }),
            None => Ok(()),
        }
    }

    /// Whether the frames are pinned. Those in movable memory are not: pinning moves them.
    pub fn is_pinned(&self) -> bool {
        self.pin.is_some()
    }

    /// Where the region lies, for the next kernel.
    pub fn locator(&self, nonce: Nonce) -> Locator {
        Locator {
            nonce,
            ranges: merge(&self.pages),
        }
    }

    /// Leaves the memory taken when this value goes: the kernel is about to be replaced.
    pub fn keep(&mut self) {
        self.file.keep();
        self.pool.keep();
        self.movable.keep();
    }

    /// Gives back what an earlier [`HugeRegion::keep`] left in `dir`; does nothing
    /// where there is nothing.
    ///
    /// # Errors
    /// What the system says.
    pub fn discard(dir: &Path) -> Result<(), RegionError> {
        let path = dir.join(FILE_NAME);
        let pages = match fs::metadata(&path) {
            Ok(meta) => meta.blocks() * STAT_BLOCK / HUGE,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).doing(|| format!("looking at {}", path.display())),
        };
        fs::remove_file(&path).doing(|| format!("removing {}", path.display()))?;
        shrink_pool(pages)?;
        umount(dir).doing(|| format!("unmounting {}", dir.display()))
    }

    fn pin_where_possible(&mut self) -> Result<(), RegionError> {
        let block_len = hotplug::block_bytes()?;
        let mut block = None;
        for page in &self.pages {
            let start = page.phys / block_len * block_len;
            if block != Some(start) && hotplug::is_movable(start)? {
                tracing::debug!(start, "region in movable memory stays unpinned");
                return Ok(());
            }
            block = Some(start);
        }
        match Pin::new(self.mapping.bytes()) {
            Ok(pin) => self.pin = Some(pin),
            // io_uring may be off (kernel.io_uring_disabled); what holds then is the check
            // of the addresses after the kernel was loaded.
            Err(error) => tracing::warn!(%error, "the region's memory could not be pinned"),
        }
        self.recheck_pfns()
    }
}

impl Region for HugeRegion {
    fn bytes(&self) -> &[u8] {
        self.mapping.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.mapping.bytes_mut()
    }

    fn sync(&mut self, _range: Range<usize>) -> io::Result<()> {
        order_memory_writes();
        Ok(())
    }
}

/// Taking pages until they fill enough blocks.
struct Search {
    block_len: u64,
    ram_end: u64,
    wanted: u64,
    pages_max: u64,
    pages: Vec<FilePage>,
}

impl Search {
    /// Takes more and more pages; the blocks to use, or `None` when no more come.
    fn grow(
        &mut self,
        file: &mut RegionFile,
        pool: &mut PoolShare,
    ) -> Result<Option<Vec<u64>>, RegionError> {
        let per_block = self.block_len / HUGE;
        loop {
            let blocks = self.blocks();
            if let Some(chosen) = choose(&blocks, self.wanted, self.block_len) {
                return Ok(Some(chosen));
            }
            // One more than is missing: what comes seldom starts where a block does.
            let missing = (self.wanted - blocks.len() as u64 + 1) * per_block;
            let room = self.pages_max.saturating_sub(self.pages.len() as u64);
            let gained = pool.grow(missing.min(room))?;
            if gained == 0 {
                return Ok(None);
            }
            self.pages.extend(file.extend(gained)?);
            tracing::debug!(
                pages = self.pages.len(),
                blocks = self.blocks().len(),
                "huge pages"
            );
        }
    }

    fn blocks(&self) -> std::collections::BTreeMap<u64, Vec<FilePage>> {
        whole_blocks(&self.pages, self.block_len, self.ram_end)
    }

    /// Blocks that could be emptied, the best first.
    fn candidates(&self) -> Result<Vec<u64>, RegionError> {
        let taken = self.blocks();
        // Blocks larger than what the next kernel needs are one memory block each;
        // smaller memory blocks do not exist on this architecture.
        let mut starts = hotplug::block_starts()?;
        starts.retain(|start| {
            !taken.contains_key(start) && may_take(*start, self.block_len, self.ram_end)
        });
        starts.reverse();
        Ok(starts)
    }

    /// Gives back the pages that fill no block.
    fn release_others(
        &mut self,
        file: &RegionFile,
        pool: &mut PoolShare,
    ) -> Result<(), RegionError> {
        let kept: Vec<FilePage> = self.blocks().into_values().flatten().collect();
        self.release_all_but(&kept, file, pool)
    }

    fn release_all_but(
        &mut self,
        kept: &[FilePage],
        file: &RegionFile,
        pool: &mut PoolShare,
    ) -> Result<(), RegionError> {
        let offsets: std::collections::HashSet<u64> = kept.iter().map(|p| p.offset).collect();
        let before = self.pages.len();
        for page in self
            .pages
            .iter()
            .filter(|page| !offsets.contains(&page.offset))
        {
            file.punch(page.offset)?;
        }
        self.pages.retain(|page| offsets.contains(&page.offset));
        pool.shrink((before - self.pages.len()) as u64)
    }
}

/// A file in a hugetlbfs of our own; both go with this value.
#[derive(Debug)]
struct RegionFile {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    len: u64,
    kept: bool,
}

impl RegionFile {
    fn create(dir: &Path) -> Result<RegionFile, RegionError> {
        let path = dir.join(FILE_NAME);
        if path.exists() {
            return Err(RegionError::InUse { path });
        }
        fs::create_dir_all(dir).doing(|| format!("creating {}", dir.display()))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("hugetlbfs"),
            dir,
            Some("hugetlbfs"),
            flags,
            Some("pagesize=2M,mode=0700"),
        )
        .doing(|| format!("mounting hugetlbfs on {}", dir.display()))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        match file {
            Ok(file) => Ok(RegionFile {
                dir: dir.to_owned(),
                path,
                file,
                len: 0,
                kept: false,
            }),
            Err(error) => {
                umount(dir).doing(|| format!("unmounting {}", dir.display()))?;
                Err(error).doing(|| format!("creating {}", path.display()))
            }
        }
    }

    /// Adds up to `pages` pages of the pool to the file's end.
    fn extend(&mut self, pages: u64) -> Result<Vec<FilePage>, RegionError> {
        let start = self.len;
        for _ in 0..pages {
            let (at, len) = (self.len as libc::off_t, HUGE as libc::off_t);
            match fallocate(&self.file, FallocateFlags::empty(), at, len) {
                Ok(()) => self.len += HUGE,
                // Somebody else was faster; what came is ours.
                Err(nix::Error::ENOSPC | nix::Error::ENOMEM) if self.len > start => break,
                Err(error) => return Err(error).doing(|| "taking huge pages".to_owned()),
            }
        }
        let added = (start..self.len).step_by(HUGE as usize);
        let mut view = Mapping::reserve((self.len - start) as usize)
            .doing(|| "reserving address space".to_owned())?;
        view.append(self.file.as_fd(), start, (self.len - start) as usize)
            .doing(|| "mapping huge pages".to_owned())?;
        let addresses =
            physical_addresses(view.bytes()).doing(|| "reading /proc/self/pagemap".to_owned())?;
        Ok(added
            .zip(addresses)
            .map(|(offset, phys)| FilePage { offset, phys })
            .collect())
    }

    fn punch(&self, offset: u64) -> Result<(), RegionError> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(
            &self.file,
            flags,
            offset as libc::off_t,
            HUGE as libc::off_t,
        )
        .doing(|| "giving back a huge page".to_owned())
    }

    /// The pages as one slice in the order given.
    fn map(&self, pages: &[FilePage]) -> Result<Mapping, RegionError> {
        let doing = || "mapping huge pages".to_owned();
        let mut mapping = Mapping::reserve(pages.len() * HUGE as usize).doing(doing)?;
        let mut rest = pages;
        while let Some(first) = rest.first() {
            let run = (0u64..)
                .zip(rest)
                .take_while(|(n, p)| p.offset == first.offset + n * HUGE);
            let run = run.count();
            mapping
                .append(self.file.as_fd(), first.offset, run * HUGE as usize)
                .doing(doing)?;
            rest = &rest[run..];
        }
        Ok(mapping)
    }

    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for RegionFile {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Freed now, not when the descriptor closes: the pool shrinks right after.
        let freed = self
            .file
            .set_len(0)
            .and_then(|()| fs::remove_file(&self.path));
        // The file is still open, and keeps the mount busy until this value is gone.
        let unmounted = nix::mount::umount2(&self.dir, nix::mount::MntFlags::MNT_DETACH);
        if let Err(error) = freed.and(unmounted.map_err(io::Error::from)) {
            tracing::warn!(%error, dir = %self.dir.display(), "undoing the region's file failed");
        }
    }
}
