//! rcr and systemd: tags, units, what crosses the jump, adoption.

pub mod dropin;
pub mod generator;
pub mod handover;
pub mod systemctl;
pub mod tags;
pub mod unit;
