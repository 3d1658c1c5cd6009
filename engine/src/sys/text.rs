//! Files that the kernel writes while they are read (proc(5)).

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// More than any of these files but mappings have.
const FIRST_BYTES: usize = 16 << 10;

thread_local! {
    /// Used again and again: the kernel does not say how long such a file is.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Reads all of a file with as few calls as the kernel allows.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    with(path.as_ref(), <[u8]>::to_vec)
}

/// As [`read`]; what is no UTF-8 is an error.
pub fn read_string(path: impl AsRef<Path>) -> io::Result<String> {
    let text = with(path.as_ref(), |bytes| {
        std::str::from_utf8(bytes).map(str::to_owned)
    })?;
    text.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Gives the content of a file to `look`, which must not read another one.
pub fn with<T>(path: &Path, look: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    let mut file = File::open(path)?;
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.is_empty() {
            buffer.resize(FIRST_BYTES, 0);
        }
        let mut len = 0;
        loop {
            match file.read(&mut buffer[len..]) {
                Ok(0) => return Ok(look(&buffer[..len])),
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if buffer.len() - len < FIRST_BYTES / 2 {
                let more = buffer.len() * 2;
                buffer.resize(more, 0);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let all: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &all).unwrap();
        assert_eq!(read(&path).unwrap(), all);
        assert!(read_string(&path).is_err());
        assert_eq!(read_string("/proc/self/comm").unwrap().lines().count(), 1);
        assert!(read(dir.path().join("y")).is_err());
    }
}
