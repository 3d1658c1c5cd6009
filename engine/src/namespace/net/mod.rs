//! Network namespaces: devices, addresses, routes, rules, neighbours, packet
//! filters, tracked connections and settings.
//!
//! What the kernel tells of an object by netlink is kept as it is and, less
//! what is measured, is also how the object is made again. A new namespace
//! already has some things (routes that follow from addresses, default rules);
//! those not wanted are removed, and what is missing is added.
//!
//! ```text
//! save   each namespace: list all ─► rcr-netns-ID.img, and CRIU's netns, netdev, ifaddr, route, rule images
//! build  all namespaces empty ─► devices, pairs across them ─► up ─► addresses ─► routes, filters, settings
//! ```

mod addresses;
mod build;
mod conntrack;
mod enter;
pub(crate) mod fuzzing;
mod links;
mod neighbours;
pub(crate) mod netlink;
mod nft;
mod routes;
mod save;
pub(crate) mod schema;
mod stream;
mod sysctls;
#[cfg(test)]
mod tests;
mod traffic;
mod xtables;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::image::ImageSource;

pub use build::{VethEnd, build_nets};
pub(crate) use enter::{inside_net, with_net};
pub use save::{NetSource, check_nets, save_nets};

/// A network namespace that no task needs to be in.
#[derive(Debug)]
pub struct NetNamespace {
    ns: OwnedFd,
}

impl NetNamespace {
    /// For setns(2) with `CLONE_NEWNET`.
    pub fn ns(&self) -> BorrowedFd<'_> {
        self.ns.as_fd()
    }
}

/// Numbers of the namespaces that are in the images.
fn saved(source: &dyn ImageSource) -> Vec<u32> {
    let number = |n: &String| {
        n.strip_prefix("rcr-netns-")?
            .strip_suffix(".img")?
            .parse()
            .ok()
    };
    source.names().iter().filter_map(number).collect()
}

fn image_name(ns_id: u32) -> String {
    format!("rcr-netns-{ns_id}.img")
}
