//! Parsers of this folder, for the fuzz targets.

use super::{diag, inet_diag, multicast, wire};

/// sock_diag(7) answers about unix and TCP sockets, and rows of attributes.
pub(crate) fn diagnosis(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((_, body, tail)) = diag::message(rest) {
        diag::parse(body);
        rest = tail;
    }
    rest = bytes;
    while let Some((_, body, tail)) = wire::split(rest) {
        for family in [libc::AF_INET, libc::AF_INET6] {
            inet_diag::peer(body, family);
        }
        wire::attributes(body).for_each(drop);
        rest = tail;
    }
    diag::parse(bytes);
}

/// `/proc/net/igmp` and `/proc/net/igmp6`.
pub(crate) fn groups(text: &str) {
    multicast::groups4(text);
    multicast::groups6(text);
}
