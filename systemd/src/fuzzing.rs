//! Parsers that are not public, for the fuzz targets in `fuzz/`.

/// `/proc/1/mountinfo`.
pub fn mounts(text: &str) {
    crate::mounts::parse(text);
}
