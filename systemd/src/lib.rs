//! rcr and systemd: tags, units, what crosses the jump, adoption.
//!
//! | module | side | what |
//! |---|---|---|
//! | [`tags`] | both | `/etc/rcr/services.list` |
//! | [`unit`], [`systemctl`] | both | what systemd knows, what it is told |
//! | [`runtime`], [`mounts`] | old | files and mounts in RAM that a service stands on |
//! | [`shield`] | old | tagged services outlast the transition, and die silently once they are in the store |
//! | [`handover`] | both | manifest, adoption records, report |
//! | [`generator`] | new | the start of a restored unit becomes an adoption |
//! | [`adopt`], [`notify`], [`process`] | new | the adoption |
//! | [`check`] | new | what systemd believes, against what was restored |
//! | [`pids`] | both | services' PIDs lie above those of early boot |

pub mod adopt;
pub mod check;
#[doc(hidden)]
pub mod fuzzing;
pub mod generator;
pub mod handover;
pub mod mounts;
pub mod notify;
pub mod pids;
pub mod process;
pub mod runtime;
pub mod shield;
pub mod systemctl;
pub mod tags;
pub mod unit;
