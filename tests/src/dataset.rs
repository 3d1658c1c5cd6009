//! What Redis is filled with, and a checksum over it.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::resp::{Client, Value};

/// Commands sent in one go.
const BATCH: u32 = 2_000;

/// For replies of a server that is busy in an emulated guest.
const PATIENCE: Duration = Duration::from_secs(60);

/// Computed in the server, so that the data need not travel.
const CHECKSUM_SCRIPT: &[u8] = b"local t = {} \
    for i = ARGV[1], ARGV[2] - 1 do \
      t[#t + 1] = redis.call('GET', string.format('key:%06d', i)) or 'none' \
    end \
    return redis.sha1hex(table.concat(t, '|'))";

/// A number of keys with pseudo-random values.
#[derive(Debug, Clone, Copy)]
pub struct Dataset {
    /// How many keys.
    pub keys: u32,
    /// Bytes of each value.
    pub value_bytes: usize,
}

impl Dataset {
    /// 200,000 keys, about 64 MiB in the server.
    pub const LARGE: Dataset = Dataset {
        keys: 200_000,
        value_bytes: 230,
    };

    /// Enough to see a difference.
    pub const SMALL: Dataset = Dataset {
        keys: 20_000,
        value_bytes: 230,
    };

    /// Sets every key and saves: else the server would fork a child for that
    /// some time later, and its processes would not be the ones we noted.
    ///
    /// # Errors
    /// When the server does not take them.
    pub fn fill(self, port: u16) -> Result<()> {
        let mut client = Client::connect(port, PATIENCE)?;
        client.call(&[b"FLUSHALL"])?;
        for first in (0..self.keys).step_by(BATCH as usize) {
            let pairs: Vec<(String, Vec<u8>)> = (first..self.keys.min(first + BATCH))
                .map(|number| (format!("key:{number:06}"), value(number, self.value_bytes)))
                .collect();
            let commands: Vec<Vec<&[u8]>> = pairs
                .iter()
                .map(|(key, value)| vec![&b"SET"[..], key.as_bytes(), value])
                .collect();
            client.pipeline(&commands)?;
        }
        client.call(&[b"SAVE"])?;
        Ok(())
    }

    /// How many keys there are, and a checksum over the values of ours.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn checksum(self, port: u16) -> Result<(i64, String)> {
        let mut client = Client::connect(port, PATIENCE)?;
        let Value::Integer(keys) = client.call(&[b"DBSIZE"])? else {
            bail!("DBSIZE is no number")
        };
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        for first in (0..self.keys).step_by(BATCH as usize) {
            let last = self.keys.min(first + BATCH);
            let (first, last) = (first.to_string(), last.to_string());
            let part = client.call(&[
                b"EVAL",
                CHECKSUM_SCRIPT,
                b"0",
                first.as_bytes(),
                last.as_bytes(),
            ])?;
            let Value::Bulk(part) = part else {
                bail!("the checksum script returned {part:?}")
            };
            // FNV-1a over the hex digits of each part.
            for byte in part {
                sum = (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        Ok((keys, format!("{sum:016x}")))
    }
}

/// Printable pseudo-random bytes that depend on the key's number alone
/// (splitmix64).
fn value(number: u32, bytes: usize) -> Vec<u8> {
    let mut state = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut value = Vec::with_capacity(bytes + 16);
    while value.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        value.extend_from_slice(format!("{word:016x}").as_bytes());
    }
    value.truncate(bytes);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_and_are_always_the_same() {
        assert_eq!(value(7, 230).len(), 230);
        assert_eq!(value(7, 230), value(7, 230));
        assert_ne!(value(7, 230), value(8, 230));
        assert_ne!(value(7, 230)[..16], value(7, 230)[16..32]);
    }
}
