//! What tests of namespaces share. Everything happens on threads with mount
//! namespaces of their own; the machine's own mounts are never touched.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Sender, channel};

use nix::unistd::Pid;

use crate::image::{ImageSink, ImageSource};

/// Images in memory.
#[derive(Debug, Default)]
pub(crate) struct Memory(BTreeMap<String, Vec<u8>>);

impl ImageSink for Memory {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        assert!(
            self.0.insert(name.to_owned(), bytes.to_vec()).is_none(),
            "{name} written twice"
        );
        Ok(())
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        self.put(name, &vec![0; len])?;
        Ok(self.0.get_mut(name).unwrap())
    }
}

impl ImageSource for Memory {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        Ok(self.0.get(name).map(Vec::as_slice))
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// A thread that has done `setup` and waits until the second value is dropped.
///
/// It stands for a service's task: `/proc/TID` knows threads as well.
pub(crate) fn parked(setup: impl FnOnce() + Send + 'static) -> (Pid, Sender<()>) {
    let (tell, told) = channel();
    let (keep, wait) = channel::<()>();
    std::thread::spawn(move || {
        setup();
        tell.send(nix::unistd::gettid()).unwrap();
        let _ = wait.recv(); // ends when the other side is dropped
    });
    (told.recv().expect("the setup panicked"), keep)
}
