//! Several dumps in one store: the images of unit `U` have names under `U/`.

use std::io;

use rcr_engine::image::{ImageSink, ImageSource};

/// A sink or source whose names all lie under one prefix of another's.
#[derive(Debug)]
pub struct Prefixed<S> {
    inner: S,
    prefix: String,
}

impl<S> Prefixed<S> {
    /// Everything of `unit` in `inner`, which is a `&mut` sink or a `&` source.
    pub fn new(inner: S, unit: &str) -> Self {
        Prefixed {
            inner,
            prefix: format!("{unit}/"),
        }
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl<S: ImageSink + ?Sized> ImageSink for Prefixed<&mut S> {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let full = self.full(name);
        self.inner.put(&full, bytes)
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        let full = self.full(name);
        self.inner.reserve(&full, len)
    }
}

impl<S: ImageSource + ?Sized> ImageSource for Prefixed<&S> {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        self.inner.get(&self.full(name))
    }

    fn names(&self) -> Vec<String> {
        let names = self.inner.names();
        names
            .iter()
            .filter_map(|name| name.strip_prefix(&self.prefix))
            .map(str::to_owned)
            .collect()
    }
}
