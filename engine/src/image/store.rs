//! Where images live, as the engine sees it.

use std::io;

/// Takes the images of a dump.
pub trait ImageSink {
    /// Stores a whole named image (`core-12.img`). A name is written once.
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Makes room for `len` bytes under `name` and hands it out to be filled.
    ///
    /// The memory starts page aligned; its content counts as stored once the
    /// sink is finished by its owner.
    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]>;
}

/// Gives back the images of a dump.
pub trait ImageSource {
    /// The image of that name, or `None` where the dump wrote none.
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>>;

    /// Every image's name.
    fn names(&self) -> Vec<String>;
}
