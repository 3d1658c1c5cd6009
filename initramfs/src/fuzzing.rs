//! Parsers that are not public, for the fuzz targets in `fuzz/`.

use crate::modules::dep::{ModulesDep, builtin_names};

/// `modules.dep` and `modules.builtin`.
pub fn modules(bytes: &[u8]) {
    builtin_names(bytes);
    if let Ok(dep) = ModulesDep::parse(bytes) {
        dep.contains("a");
        let _ = dep.load_order(&["a", "b"]);
    }
}
