//! Stage 1: the tagged services, running, as systemd sees them.
//!
//! Success: each has a control group with processes. Failure: nothing touched.

use std::path::Path;

use anyhow::{Result, bail};
use rcr_systemd::tags::{TAG_FILE, TagList};
use rcr_systemd::unit::Unit;

/// The tagged services.
#[derive(Debug)]
pub struct Tagged {
    /// In the order of the tag list, aliases resolved, each once.
    pub units: Vec<Unit>,
}

impl Tagged {
    /// Reads the tag list and asks systemd about each unit. Every unit that
    /// cannot be used is told, not the first one alone.
    pub fn read() -> Result<Self> {
        let list = TagList::load(Path::new(TAG_FILE))?;
        let mut units: Vec<Unit> = Vec::new();
        let mut faults = Vec::new();
        for name in list.units() {
            match Unit::query(&name).and_then(|unit| unit.require_running().map(|()| unit)) {
                Ok(unit) if units.iter().all(|other| other.id != unit.id) => units.push(unit),
                Ok(_alias) => {}
                Err(e) => faults.push(e.to_string()),
            }
        }
        if !faults.is_empty() {
            bail!("{}", faults.join("\n"));
        }
        if units.is_empty() {
            bail!("no service is tagged; tag one with `rcr tag UNIT`");
        }
        Ok(Tagged { units })
    }
}
