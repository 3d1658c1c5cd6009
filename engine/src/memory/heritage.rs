//! Pages that several processes have in common since a fork, until one of
//! them writes (copy on write).
//!
//! On dump the frames behind the pages tell: the same frame at the same
//! address is the same page, and belongs to whoever was looked at first. On
//! restore a child is forked after the memory of the process it comes from is
//! filled, keeps what it has in common with it, and gets only the rest.
//!
//! What brothers share and their parent has overwritten since is put into the
//! parent for as long as they are born.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use super::MemoryError;
use super::pagemap::{PAGE, Pagemap, push};
use super::pages::{Piece, Runs, Saved};
use super::vma::{self, status};
use crate::image::schema::VmaEntry;
use crate::image::{ImageError, ImageSource, Kind, get_records, names};

/// A run of pages that another process has as well, at the same address:
/// `rcr-shared-pages-PID.img`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SharedPages {
    /// The first address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Number of pages.
    #[prost(uint64, required, tag = "2")]
    pub pages: u64,
    /// The process whose pages they are.
    #[prost(int32, required, tag = "3")]
    pub owner: i32,
    /// They are with the owner alone: neither this process's own images have
    /// them, nor their parents.
    #[prost(bool, tag = "4")]
    pub with_owner: bool,
}

impl SharedPages {
    fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }

    /// The addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end()
    }
}

/// Name of the list of a process's [`SharedPages`].
pub fn image(pid: i32) -> String {
    format!("rcr-shared-pages-{pid}.img")
}

/// Frame numbers are their own hash, spread.
#[derive(Debug, Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
}

/// Who has which page, as the processes of a tree are looked at.
#[derive(Debug, Default)]
pub struct Owners {
    /// By frame: the address it was found at, and by whom.
    first: HashMap<u64, (u64, i32), BuildHasherDefault<Spread>>,
}

impl Owners {
    /// Looks at the pages of process `pid`, of which `tid` is a living thread;
    /// gives those that an earlier one has, and notes in `runs` which of them
    /// are to be read with care.
    pub fn look(
        &mut self,
        pid: i32,
        tid: i32,
        runs: &mut Runs,
    ) -> Result<Vec<SharedPages>, MemoryError> {
        let io = || MemoryError::io(format!("pagemap of {pid}"));
        let pagemap = Pagemap::open(tid).map_err(io())?;
        let mut out: Vec<SharedPages> = Vec::new();
        let ranges = runs.ranges();
        let note = |addr: u64, frame: u64| {
            push(&mut runs.with_care, addr, addr + PAGE);
            let &mut (at, owner) = self.first.entry(frame).or_insert((addr, pid));
            if at != addr || owner == pid {
                return;
            }
            match out.last_mut() {
                Some(l) if l.owner == owner && l.end() == addr => l.pages += 1,
                _ => out.push(SharedPages {
                    start: addr,
                    pages: 1,
                    owner,
                    with_owner: false,
                }),
            }
        };
        pagemap.maybe_shared(&ranges, note).map_err(io())?;
        Ok(out)
    }
}

/// Reads a process's list and checks it.
pub fn load(source: &dyn ImageSource, pid: i32) -> Result<Vec<SharedPages>, MemoryError> {
    let name = image(pid);
    let list: Vec<SharedPages> = get_records(source, Kind::RcrTasks, &name)?;
    let mut last = 0;
    for s in &list {
        let end = s
            .pages
            .checked_mul(PAGE)
            .and_then(|n| n.checked_add(s.start));
        if s.start < last || end.is_none() || s.pages == 0 {
            let what = "the runs do not ascend".to_owned();
            return Err(ImageError::Content { name, what }.into());
        }
        last = s.end();
    }
    Ok(list)
}

/// All saved pages of a process with their owners, also those that lie in the
/// images of others.
pub fn pages<'a>(source: &'a dyn ImageSource, pid: i32) -> Result<Vec<Piece<'a>>, MemoryError> {
    let shared = load(source, pid)?;
    let with_owner = |shared: &[SharedPages]| -> Vec<Range<u64>> {
        let apart = shared.iter().filter(|s| s.with_owner);
        apart.map(SharedPages::range).collect()
    };
    let name = names::pagemap(pid);
    let (saved, elsewhere) = Saved::load_partly(source, &name, &with_owner(&shared))?;
    let mut all = saved.pieces;
    if !elsewhere.is_empty() {
        let missing = || {
            let (name, what) = (image(pid), "pages are in no image".to_owned());
            MemoryError::from(ImageError::Content { name, what })
        };
        let mut owners: BTreeMap<i32, Saved<'a>> = BTreeMap::new();
        let mut found = 0;
        for s in &shared {
            let owner = match owners.entry(s.owner) {
                Entry::Occupied(e) => e.into_mut(),
                Entry::Vacant(e) => {
                    let apart = with_owner(&load(source, s.owner)?);
                    let name = names::pagemap(s.owner);
                    e.insert(Saved::load_partly(source, &name, &apart)?.0)
                }
            };
            let n = elsewhere.partition_point(|e| e.start + e.len as u64 <= s.start);
            for e in elsewhere[n..].iter().take_while(|e| e.start < s.end()) {
                let (from, to) = (e.start.max(s.start), s.end().min(e.start + e.len as u64));
                for piece in owner.within(from, to) {
                    found += piece.bytes.len();
                    all.push(piece);
                }
            }
        }
        if found != elsewhere.iter().map(|e| e.len).sum::<usize>() {
            return Err(missing());
        }
        all.sort_unstable_by_key(|p| p.start);
        if all.windows(2).any(|w| w[0].end() > w[1].start) {
            return Err(missing());
        }
    }
    Ok(mark(&all, pid, &shared))
}

/// Marks pages (ascending) with their owners: `pid` where nobody else is named.
pub fn mark<'a>(pieces: &[Piece<'a>], pid: i32, shared: &[SharedPages]) -> Vec<Piece<'a>> {
    let mut out = Vec::with_capacity(pieces.len() + shared.len());
    let mut shared = shared;
    for p in pieces {
        let mut at = p.start;
        while at < p.end() {
            while shared.first().is_some_and(|s| s.end() <= at) {
                shared = &shared[1..];
            }
            let (end, owner) = match shared.first() {
                Some(s) if s.start <= at => (s.end(), s.owner),
                Some(s) => (s.start, pid),
                None => (p.end(), pid),
            };
            let part = p.clip(at, end).expect("it lies inside");
            at = part.end();
            out.push(Piece { owner, ..part });
        }
    }
    out
}

/// Cuts two ascending lists at each other's edges and calls `each` for every
/// run that at least one of them has.
pub fn side_by_side<'a>(
    a: &[Piece<'a>],
    b: &[Piece<'a>],
    mut each: impl FnMut(Option<Piece<'a>>, Option<Piece<'a>>),
) {
    let (mut i, mut j, mut at) = (0, 0, 0);
    loop {
        while a.get(i).is_some_and(|p| p.end() <= at) {
            i += 1;
        }
        while b.get(j).is_some_and(|p| p.end() <= at) {
            j += 1;
        }
        let (x, y) = (a.get(i), b.get(j));
        let starts = [x, y].map(|p| p.map(|p| p.start.max(at)));
        let Some(start) = starts.into_iter().flatten().min() else {
            return;
        };
        let edges = [x, y]
            .into_iter()
            .flatten()
            .flat_map(|p| [p.start, p.end()]);
        let end = edges.filter(|&e| e > start).min().expect("its own end");
        let part = |p: Option<&Piece<'a>>| p.and_then(|p| p.clip(start, end));
        each(part(x), part(y));
        at = end;
    }
}

/// What a process is filled with while its `heirs` (each with its pid) are
/// born: its own pages, but where it has overwritten what only they still
/// share, that.
pub fn before_births<'a>(own: &[Piece<'a>], heirs: &[(i32, &[Piece<'a>])]) -> Vec<Piece<'a>> {
    let mut theirs: BTreeMap<u64, Piece<'a>> = BTreeMap::new();
    let mut ours: Vec<Range<u64>> = Vec::new();
    for &(pid, pieces) in heirs {
        side_by_side(own, pieces, |x, y| match (x, y) {
            (Some(x), Some(y)) if x.owner == y.owner => ours.push(y.start..y.end()),
            (Some(_), Some(y)) if y.owner != pid => {
                for page in (y.start..y.end()).step_by(PAGE as usize) {
                    let piece = y.clip(page, page + PAGE);
                    theirs.entry(page).or_insert(piece.expect("it lies inside"));
                }
            }
            _ => {}
        });
    }
    for r in &ours {
        let mut taken = theirs.split_off(&r.start);
        theirs.append(&mut taken.split_off(&r.end));
    }
    let theirs: Vec<Piece<'a>> = theirs.into_values().collect();
    let mut out = Vec::with_capacity(own.len());
    side_by_side(own, &theirs, |x, y| out.extend(y.or(x)));
    out
}

/// What is to be done to memory as it was inherited so that it holds `own`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes<'a> {
    /// Pages to write.
    pub write: Vec<Piece<'a>>,
    /// Pages to give up.
    pub drop: Vec<Range<u64>>,
}

/// Compares what was inherited with what a process is to have; `kept` are the
/// ranges (ascending) in which anything was inherited at all.
pub fn changes<'a>(inherited: &[Piece<'a>], own: &[Piece<'a>], kept: &[Range<u64>]) -> Changes<'a> {
    let part = |r: &Range<u64>| {
        let first = inherited.partition_point(|p| p.end() <= r.start);
        let rest = inherited[first..].iter();
        rest.map_while(|p| p.clip(r.start, r.end))
            .collect::<Vec<_>>()
    };
    let there: Vec<Piece<'a>> = kept.iter().flat_map(part).collect();
    let mut out = Changes::default();
    side_by_side(&there, own, |x, y| match (x, y) {
        (Some(x), Some(y)) if x.owner == y.owner => {}
        (_, Some(y)) => out.write.push(y),
        (Some(x), None) => out.drop.push(x.start..x.end()),
        (None, None) => {}
    });
    out
}

/// A mapping that a process has from its birth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What of it is there; it may have to grow at its end.
    pub range: Range<u64>,
    /// Its protection now.
    pub prot: i32,
}

/// The mappings of `own` that stay as they were inherited from a process with
/// `theirs` and their content, by their first addresses.
pub fn keep(
    theirs: &[VmaEntry],
    inherited: &[Piece<'_>],
    own: &[VmaEntry],
    content: &[Piece<'_>],
    same_exe: bool,
) -> BTreeMap<u64, Kept> {
    let mut common: Vec<Range<u64>> = Vec::new();
    side_by_side(inherited, content, |x, y| {
        if let (Some(x), Some(y)) = (x, y)
            && x.owner == y.owner
        {
            common.push(x.start..x.end());
        }
    });
    let mut out = BTreeMap::new();
    for v in own.iter().filter(|v| vma::has_own_pages(v)) {
        let n = theirs.partition_point(|u| u.end <= v.start);
        let Some(u) = theirs.get(n).filter(|u| inheritable(u, v, same_exe)) else {
            continue;
        };
        let range = v.start..v.end.min(u.end);
        let n = common.partition_point(|r| r.end <= range.start);
        if common.get(n).is_none_or(|r| r.start >= range.end) {
            continue;
        }
        let had = inherited.partition_point(|p| p.end() <= u.start);
        let had = inherited.get(had).is_some_and(|p| p.start < u.end);
        let prot = match had {
            true => u.prot as i32 | libc::PROT_WRITE,
            false => u.prot as i32,
        };
        out.insert(v.start, Kept { range, prot });
    }
    out
}

/// Whether a mapping can go on as a part of the one its process was born with.
fn inheritable(u: &VmaEntry, v: &VmaEntry, same_exe: bool) -> bool {
    const EARLY: u64 = 1 << libc::MADV_HUGEPAGE | 1 << libc::MADV_NOHUGEPAGE;
    let flags = |e: &VmaEntry| e.flags as i32 & !libc::MAP_LOCKED;
    let early = |e: &VmaEntry| e.madv.unwrap_or(0) & EARLY;
    let file = v.status & status::FILE_PRIVATE != 0;
    let kinds = status::ANON_PRIVATE | status::FILE_PRIVATE;
    u.start <= v.start
        && flags(u) == flags(v)
        && flags(v) & libc::MAP_HUGETLB == 0
        && early(u) == early(v)
        && (u.status ^ v.status) & kinds == 0
        && (!file || same_exe && u.shmid == v.shmid && u.pgoff + (v.start - u.start) == v.pgoff)
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "lists of one range are meant"
)]
mod tests {
    use super::*;

    const A: u64 = 0x10000;
    static BYTES: [u8; 16 * PAGE as usize] = [0; 16 * PAGE as usize];

    /// `pages` pages from page `n` on.
    fn piece(n: u64, pages: u64, owner: i32) -> Piece<'static> {
        Piece {
            start: A + n * PAGE,
            bytes: &BYTES[..(pages * PAGE) as usize],
            owner,
        }
    }

    fn shape(pieces: &[Piece<'_>]) -> Vec<(u64, u64, i32)> {
        let one = |p: &Piece<'_>| ((p.start - A) / PAGE, p.bytes.len() as u64 / PAGE, p.owner);
        pieces.iter().map(one).collect()
    }

    #[test]
    fn owners_cut_the_pieces() {
        let shared = [(1, 2, 7), (5, 9, 8)].map(|(n, pages, owner)| SharedPages {
            start: A + n * PAGE,
            pages,
            owner,
            with_owner: true,
        });
        let marked = mark(&[piece(0, 4, 0), piece(6, 2, 0)], 9, &shared);
        assert_eq!(shape(&marked), [(0, 1, 9), (1, 2, 7), (3, 1, 9), (6, 2, 8)]);
    }

    #[test]
    fn an_heir_gets_what_differs() {
        let inherited = [piece(0, 4, 1), piece(8, 2, 1)];
        let own = [
            piece(0, 2, 1),
            piece(2, 1, 2),
            piece(5, 1, 2),
            piece(8, 2, 1),
        ];
        let kept = [A..A + 6 * PAGE];
        let c = changes(&inherited, &own, &kept);
        assert_eq!(shape(&c.write), [(2, 1, 2), (5, 1, 2), (8, 2, 1)]);
        assert_eq!(c.drop, [A + 3 * PAGE..A + 4 * PAGE]);
    }

    #[test]
    fn brothers_get_theirs_through_the_parent() {
        let own = [piece(0, 6, 1)];
        // Page 1: only they share it. Page 2: the third still has the parent's.
        let elder = [piece(0, 1, 1), piece(1, 2, 2)];
        let younger = [piece(0, 1, 1), piece(1, 2, 2)];
        let third = [piece(0, 1, 1), piece(2, 1, 1)];
        let heirs: [(i32, &[Piece<'_>]); 3] = [(2, &elder), (3, &younger), (4, &third)];
        let fill = before_births(&own, &heirs);
        assert_eq!(shape(&fill), [(0, 1, 1), (1, 1, 2), (2, 4, 1)]);
    }

    proptest::proptest! {
        #[test]
        fn changes_lead_from_one_to_the_other(
            a in proptest::collection::vec(0i32..4, 12),
            b in proptest::collection::vec(0i32..4, 12),
        ) {
            let pieces = |owners: &[i32]| -> Vec<Piece<'static>> {
                let there = owners.iter().enumerate().filter(|(_, o)| **o != 0);
                there.map(|(n, &o)| piece(n as u64, 1, o)).collect()
            };
            let c = changes(&pieces(&a), &pieces(&b), &[A..A + 12 * PAGE]);
            let mut now = a.clone();
            for r in &c.drop {
                for n in (r.start - A) / PAGE..(r.end - A) / PAGE {
                    now[n as usize] = 0;
                }
            }
            for (n, pages, owner) in shape(&c.write) {
                now[n as usize..(n + pages) as usize].fill(owner);
            }
            proptest::prop_assert_eq!(now, b);
        }
    }
}
