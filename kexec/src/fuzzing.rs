//! Parsers that are not public, for the fuzz targets in `fuzz/`.

/// `/proc/iomem`.
pub fn crash_kernel(text: &str) {
    crate::machine::parse_crash_kernel(text);
}
