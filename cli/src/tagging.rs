//! `rcr tag`, `rcr untag`, `rcr list`.

use std::path::Path;

use rcr_systemd::systemctl;
use rcr_systemd::tags::{ServiceName, TAG_FILE, TagList};
use rcr_systemd::unit::{Unit, UnitError};

use crate::exit::{Exit, Failure, OrExit};

/// Carries `plain systemctl kexec`; started with the first tag.
const PRE_KEXEC: &str = "rcr-pre-kexec.service";

/// Tags services. Each must exist; none needs to run.
pub fn tag(words: &[String]) -> Result<(), Failure> {
    let mut list = TagList::load(Path::new(TAG_FILE)).or_environment()?;
    let mut changed = false;
    for word in words {
        let name = known(word)?;
        if list.add(&name) {
            changed = true;
            println!("{name} tagged");
        } else {
            println!("{name} was tagged already");
        }
    }
    save(&list, changed)
}

/// Untags services; they need not exist any more.
pub fn untag(words: &[String]) -> Result<(), Failure> {
    let mut list = TagList::load(Path::new(TAG_FILE)).or_environment()?;
    let mut changed = false;
    for word in words {
        let name = ServiceName::parse(word).or_environment()?;
        // The list may have an alias or the word itself.
        let alias = Unit::query(&name)
            .ok()
            .and_then(|u| ServiceName::parse(&u.id).ok());
        if list.remove(&name) || alias.is_some_and(|alias| list.remove(&alias)) {
            changed = true;
            println!("{name} untagged");
        } else {
            println!("{name} was not tagged");
        }
    }
    save(&list, changed)
}

/// Prints the tagged services with their state.
pub fn list(json: bool) -> Result<(), Failure> {
    let list = TagList::load(Path::new(TAG_FILE)).or_environment()?;
    let mut rows = Vec::new();
    for name in list.units() {
        let unit = Unit::query(&name).or_environment()?;
        let state = match unit.load_state.as_str() {
            "loaded" => unit.active_state,
            other => other.to_owned(),
        };
        rows.push(serde_json::json!({ "unit": name, "state": state, "main_pid": unit.main_pid }));
        if !json {
            let pid = unit.main_pid.map_or("-".to_owned(), |pid| pid.to_string());
            println!("{:<40} {state:<12} {pid}", name.as_str());
        }
    }
    if json {
        println!("{:#}", serde_json::Value::from(rows));
    }
    Ok(())
}

/// A service that systemd knows, by its full name.
fn known(word: &str) -> Result<ServiceName, Failure> {
    let name = ServiceName::parse(word).or_environment()?;
    let unit = Unit::query(&name).or_environment()?;
    match unit.load_state.as_str() {
        "loaded" => ServiceName::parse(&unit.id).or_environment(),
        "not-found" => Err(Failure::new(
            Exit::Environment,
            UnitError::NotFound { unit: unit.id },
        )),
        state => Err(Failure::new(
            Exit::Environment,
            UnitError::NotLoaded {
                state: state.to_owned(),
                unit: unit.id,
                detail: unit.load_error,
            },
        )),
    }
}

fn save(list: &TagList, changed: bool) -> Result<(), Failure> {
    if !changed {
        return Ok(());
    }
    list.save(Path::new(TAG_FILE)).or_environment()?;
    // The generator orders our unit after the tagged ones.
    systemctl::daemon_reload().or_environment()?;
    let pre_kexec = ServiceName::parse(PRE_KEXEC).expect("a valid name");
    let installed = Unit::query(&pre_kexec).is_ok_and(|unit| unit.load_state == "loaded");
    if installed && !list.units().is_empty() {
        systemctl::run(&["start", "--no-block", PRE_KEXEC]).or_environment()?;
    }
    Ok(())
}
