//! Being in another network namespace for a while.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::namespace::NamespaceError;
use crate::namespace::ids::open_ns;
use crate::namespace::view::on_own_thread;

/// Does something in a network namespace, on a thread of its own that ends there.
pub(crate) fn inside_net<T: Send>(
    ns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, NamespaceError> + Send,
) -> Result<T, NamespaceError> {
    on_own_thread("network namespace", || {
        enter(ns)?;
        work()
    })
}

/// Does something in a network namespace on the calling thread, which comes
/// back afterwards. `None`: in the one it is in.
///
/// If it cannot come back the process ends: it would go on in a place where
/// nothing is what its callers think.
pub(crate) fn with_net<T>(
    ns: Option<BorrowedFd<'_>>,
    work: impl FnOnce() -> T,
) -> Result<T, NamespaceError> {
    let Some(ns) = ns else {
        return Ok(work());
    };
    let own = open_ns("/proc/thread-self/ns/net")?;
    enter(ns)?;
    let result = work();
    if let Err(e) = enter(own.as_fd()) {
        tracing::error!("cannot leave a network namespace: {e}");
        std::process::abort();
    }
    Ok(result)
}

fn enter(ns: BorrowedFd<'_>) -> Result<(), NamespaceError> {
    move_into_link_name_space(ns, Some(LinkNameSpaceType::Network))
        .map_err(NamespaceError::call("setns", "network namespace"))
}
