//! Images in a directory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::mman::ProtFlags;

use super::map::{Content, Mapping};
use super::store::{GENERATIONS_MAX, PARENT_PREFIX};
use super::{ImageSink, ImageSource};

/// Writes each image as a file of a directory, readable by its owner alone:
/// images hold what the memory of the tasks held, keys included.
#[derive(Debug)]
pub struct DirSink {
    dir: PathBuf,
    /// The directories that are of our making, outermost first.
    made: Vec<PathBuf>,
    written: Vec<PathBuf>,
    maps: Vec<Mapping>,
}

impl DirSink {
    /// Stores into `dir`, which is made if it does not exist.
    pub fn create(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        let missing = dir.ancestors().take_while(|d| !d.exists());
        let mut made: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        made.retain(|d| !d.as_os_str().is_empty());
        made.reverse();
        fs::create_dir_all(&dir)?;
        Ok(Self {
            dir,
            made,
            written: Vec::new(),
            maps: Vec::new(),
        })
    }

    /// Takes away what was written: half a dump is none.
    pub fn discard(self) {
        for path in &self.written {
            if let Err(e) = fs::remove_file(path) {
                tracing::warn!("{}: {e}", path.display());
            }
        }
        for dir in self.made.iter().rev() {
            if let Err(e) = fs::remove_dir(dir) {
                tracing::warn!("{}: {e}", dir.display());
            }
        }
    }

    /// Names the images that these refer to: the path, relative to `dir` or
    /// absolute, becomes the symlink that readers follow.
    pub fn set_parent(&mut self, parent: &Path) -> io::Result<()> {
        let link = self.dir.join(DirSource::PARENT);
        std::os::unix::fs::symlink(parent, &link)?;
        self.written.push(link);
        Ok(())
    }

    fn file(&mut self, name: &str) -> io::Result<File> {
        let path = path_of(&self.dir, name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        self.written.push(path);
        Ok(file)
    }
}

impl ImageSink for DirSink {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.file(name)?.write_all(bytes)
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        let file = self.file(name)?;
        // Allocated at once: a full filesystem is an error here, not a SIGBUS later.
        if len > 0 {
            nix::fcntl::posix_fallocate(&file, 0, len as i64)?;
        }
        let map = Mapping::new(&file, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        self.maps.push(map);
        Ok(self.maps.last_mut().expect("just pushed").bytes_mut())
    }
}

/// Reads the images of a directory.
#[derive(Debug)]
pub struct DirSource {
    images: BTreeMap<String, Content>,
    /// What a symlink `parent` leads to; its images are called `parent/NAME`.
    parent: Option<Box<DirSource>>,
}

impl DirSource {
    /// Name of the symlink to the images before these.
    pub const PARENT: &str = "parent";

    /// Maps every regular file in `dir`, and those of its parents.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::open_chain(dir, GENERATIONS_MAX)
    }

    fn open_chain(dir: &Path, left: usize) -> io::Result<Self> {
        let mut images = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if !entry.file_type()?.is_file() {
                continue;
            }
            let mut file = File::open(entry.path())?;
            let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
            images.insert(name, Content::of(&mut file, len)?);
        }
        let link = dir.join(Self::PARENT);
        let parent = match (fs::symlink_metadata(&link).is_ok(), left) {
            (false, _) => None,
            (true, 0) => {
                let what = format!("{}: more than {GENERATIONS_MAX} parents", dir.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            // Resolved at each step: a path of many symlinks is none to the kernel.
            (true, _) => {
                let dir = fs::canonicalize(&link)
                    .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", link.display())))?;
                Some(Box::new(Self::open_chain(&dir, left - 1)?))
            }
        };
        Ok(Self { images, parent })
    }
}

impl ImageSource for DirSource {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        match (name.strip_prefix(PARENT_PREFIX), &self.parent) {
            (Some(rest), Some(parent)) => parent.get(rest),
            (Some(_), None) => Ok(None),
            (None, _) => Ok(self.images.get(name).map(Content::bytes)),
        }
    }

    fn names(&self) -> Vec<String> {
        self.images.keys().cloned().collect()
    }
}

/// The file of an image; a name is one plain path component.
fn path_of(dir: &Path, name: &str) -> io::Result<PathBuf> {
    if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
        let what = format!("{name:?} is no image name");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    Ok(dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_or_filled_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = DirSink::create(dir.path().join("images")).unwrap();
        sink.put("a.img", b"alpha").unwrap();
        sink.reserve("pages-1.img", 8192).unwrap()[4096..].fill(7);
        assert!(sink.reserve("empty.img", 0).unwrap().is_empty());
        drop(sink);

        let source = DirSource::open(&dir.path().join("images")).unwrap();
        assert_eq!(source.names(), ["a.img", "empty.img", "pages-1.img"]);
        assert_eq!(source.get("a.img").unwrap(), Some(b"alpha".as_slice()));
        let pages = source.get("pages-1.img").unwrap().unwrap();
        assert!(pages[..4096].iter().all(|&b| b == 0) && pages[4096..].iter().all(|&b| b == 7));
        assert_eq!(source.get("empty.img").unwrap(), Some(b"".as_slice()));
        assert_eq!(source.get("b.img").unwrap(), None);
    }

    #[test]
    fn a_discarded_dump_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("images");
        let mut sink = DirSink::create(&at).unwrap();
        sink.put("a.img", b"1").unwrap();
        sink.set_parent(dir.path()).unwrap();
        sink.discard();
        assert!(!at.exists());
        let deep = DirSink::create(dir.path().join("b/c/d")).unwrap();
        deep.discard();
        assert!(!dir.path().join("b").exists());
        let mut sink = DirSink::create(dir.path()).unwrap();
        sink.put("a.img", b"1").unwrap();
        std::fs::write(dir.path().join("theirs"), "").unwrap();
        assert!(sink.put("theirs", b"2").is_err());
        sink.discard();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn parents_are_followed_and_circles_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, parent) in [("a", None), ("b", Some("../a")), ("c", Some("../b"))] {
            let mut sink = DirSink::create(at(name)).unwrap();
            sink.put("x.img", name.as_bytes()).unwrap();
            if let Some(parent) = parent {
                sink.set_parent(Path::new(parent)).unwrap();
            }
        }
        let source = DirSource::open(&at("c")).unwrap();
        let get = |name: &str| source.get(name).unwrap();
        assert_eq!(get("x.img"), Some(b"c".as_slice()));
        assert_eq!(get("parent/x.img"), Some(b"b".as_slice()));
        assert_eq!(get("parent/parent/x.img"), Some(b"a".as_slice()));
        assert_eq!(get("parent/parent/parent/x.img"), None);
        let mut sink = DirSink::create(at("a")).unwrap();
        sink.set_parent(Path::new("../c")).unwrap();
        assert!(DirSource::open(&at("c")).is_err());
    }

    #[test]
    fn a_name_is_written_once_and_stays_inside() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = DirSink::create(dir.path()).unwrap();
        sink.put("a.img", b"1").unwrap();
        assert_eq!(
            sink.put("a.img", b"2").unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        for name in ["", "..", "../x", "a/b"] {
            assert_eq!(
                sink.put(name, b"").unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }
}
