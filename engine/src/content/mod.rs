//! Content of file trees that live in RAM and would be lost with the kernel:
//! tmpfs mounts of a service, its runtime directory, its private `/tmp`.
//!
//! ```text
//! rcr-tree-NAME.img   one TreeEntry (name list), kind RcrContent
//! rcr-tree-NAME.dat   the files' data, extents after each other, no header
//! ```
//! Holes stay holes. Sockets are recorded but not made again: whoever restores
//! the socket binds it. Other file systems mounted inside a tree are not entered.

mod carry;
mod error;
mod restore;
mod save;
pub(crate) mod schema;
#[cfg(test)]
mod tests;

pub use carry::{estimate_paths, restore_paths, save_paths};
pub use error::ContentError;
pub use restore::{restore_node, restore_tree};
pub use save::{TreeStats, estimate_tree, save_node, save_tree};
pub use schema::{ExtentEntry, NodeEntry, NodeKind, TreeEntry, XattrEntry};

/// Name of a tree's list of nodes.
pub(crate) fn list_name(tree: &str) -> String {
    format!("rcr-tree-{tree}.img")
}

/// Name of a tree's data.
pub(crate) fn data_name(tree: &str) -> String {
    format!("rcr-tree-{tree}.dat")
}
