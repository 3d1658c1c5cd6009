//! Images that are rows of netlink messages, as `ip(8)` saves and restores them.

use super::netlink::{Message, message, messages};
use crate::image::{ImageError, ImageSink, ImageSource, put_image};

/// What such a file begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Nothing.
    None,
    /// That of `ip address save`.
    Addresses,
    /// That of `ip route save`.
    Routes,
    /// That of `ip rule save`.
    Rules,
}

impl Start {
    fn bytes(self) -> Vec<u8> {
        let magic: u32 = match self {
            Self::None => return Vec::new(),
            Self::Addresses => 0x4736_1222,
            Self::Routes => 0x4531_1224,
            Self::Rules => 0x7170_6986,
        };
        magic.to_ne_bytes().to_vec()
    }
}

/// Writes a row, unless there is nothing in it.
pub(super) fn put(
    sink: &mut dyn ImageSink,
    name: &str,
    start: Start,
    row: &[Message],
) -> Result<(), ImageError> {
    if row.is_empty() {
        return Ok(());
    }
    let mut bytes = start.bytes();
    for m in row {
        bytes.extend_from_slice(&message(m.kind, m.flags, 0, &m.body));
    }
    put_image(sink, name, &bytes)
}

/// Reads a row; an absent file is an empty one.
pub(super) fn get(
    source: &dyn ImageSource,
    name: &str,
    start: Start,
) -> Result<Vec<Message>, ImageError> {
    let content = |what: &str| ImageError::Content {
        name: name.to_owned(),
        what: what.to_owned(),
    };
    let bytes = source.get(name).map_err(|source| ImageError::Io {
        name: name.to_owned(),
        source,
    })?;
    let Some(bytes) = bytes else {
        return Ok(Vec::new());
    };
    let rest = bytes
        .strip_prefix(&start.bytes()[..])
        .ok_or_else(|| content("does not begin as it should"))?;
    messages(rest)
        .map(|m| m.ok_or_else(|| content("a torn message")))
        .collect()
}
