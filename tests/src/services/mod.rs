//! Services that people run, each with clients outside that hold connections
//! open before, through and after upgrades.
//!
//! ```text
//!  xtask ──> round ──> a machine: set-up, start, `rcr check`, tag, N upgrades
//!              ├─────> client::Holding ⇄ forwarded port ⇄ service
//!              └─────> table: docs/services.json ──> docs/SERVICES.md
//! ```

pub mod caches;
pub mod catalog;
pub mod client;
pub mod databases;
pub mod http;
pub mod messages;
pub mod piped;
pub mod round;
pub mod sessions;
pub mod table;
pub mod wire;
