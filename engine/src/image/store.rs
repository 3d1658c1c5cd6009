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

/// In front of the name of an image of the generation before (see
/// [`ImageSource::get`]).
pub const PARENT_PREFIX: &str = "parent/";

/// Parents in a row that are followed: more are a circle.
pub const GENERATIONS_MAX: usize = 64;

/// Gives back the images of a dump.
pub trait ImageSource {
    /// The image of that name, or `None` where the dump wrote none. A dump that
    /// refers to an earlier one finds its images below [`PARENT_PREFIX`], and
    /// those before them below one more.
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>>;

    /// Every image's name.
    fn names(&self) -> Vec<String>;
}

/// Gives one of several generations that lie in one sink.
pub struct Generation<'a> {
    sink: &'a mut dyn ImageSink,
    prefix: String,
}

impl<'a> Generation<'a> {
    /// Puts `prefix` in front of every name.
    pub fn new(sink: &'a mut dyn ImageSink, prefix: impl Into<String>) -> Self {
        let prefix = prefix.into();
        Self { sink, prefix }
    }
}

impl ImageSink for Generation<'_> {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.sink.put(&format!("{}{name}", self.prefix), bytes)
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        self.sink.reserve(&format!("{}{name}", self.prefix), len)
    }
}

/// Reads generations that lie in one source.
pub struct Generations<'a> {
    source: &'a dyn ImageSource,
    prefixes: Vec<String>,
}

impl<'a> Generations<'a> {
    /// `prefixes`: the newest first.
    pub fn new(source: &'a dyn ImageSource, prefixes: Vec<String>) -> Self {
        Self { source, prefixes }
    }
}

impl ImageSource for Generations<'_> {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        let mut name = name;
        let mut age = 0;
        while let Some(rest) = name.strip_prefix(PARENT_PREFIX) {
            name = rest;
            age += 1;
        }
        match self.prefixes.get(age) {
            Some(prefix) => self.source.get(&format!("{prefix}{name}")),
            None => Ok(None),
        }
    }

    fn names(&self) -> Vec<String> {
        let prefix = self.prefixes.first().map_or("", String::as_str);
        let all = self.source.names();
        let own = all.iter().filter_map(|n| n.strip_prefix(prefix));
        let older = |n: &&str| {
            let mut others = self.prefixes.iter().skip(1);
            !others.any(|p| p.len() > prefix.len() && format!("{prefix}{n}").starts_with(p))
        };
        own.filter(older).map(str::to_owned).collect()
    }
}
