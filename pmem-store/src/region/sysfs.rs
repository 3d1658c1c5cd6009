//! Small files of the kernel.

use std::fs;
use std::path::Path;

use super::region_error::{Context, RegionError};

/// The text of `path` without the line's end.
pub(super) fn read(path: &Path) -> Result<String, RegionError> {
    let text = fs::read_to_string(path).doing(|| format!("reading {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// Writes `text` in one go.
pub(super) fn write(path: &Path, text: &str) -> Result<(), RegionError> {
    fs::write(path, text).doing(|| format!("writing {text:?} to {}", path.display()))
}

/// A decimal number.
pub(super) fn read_u64(path: &Path) -> Result<u64, RegionError> {
    let text = read(path)?;
    text.parse().map_err(|_| unparsable(path, text))
}

/// A hexadecimal number, with or without `0x`.
pub(super) fn read_hex(path: &Path) -> Result<u64, RegionError> {
    let text = read(path)?;
    let digits = text.strip_prefix("0x").unwrap_or(&text);
    u64::from_str_radix(digits, 16).map_err(|_| unparsable(path, text))
}

/// A `Name:   123 kB` line of /proc/meminfo, in bytes.
pub(super) fn meminfo(name: &str) -> Result<u64, RegionError> {
    let path = Path::new("/proc/meminfo");
    let text = read(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| unparsable(path, text))
}

pub(super) fn unparsable(path: &Path, content: String) -> RegionError {
    RegionError::Unparsable {
        path: path.to_owned(),
        content,
    }
}
