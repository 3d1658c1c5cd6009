//! What would stop a service all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::ShieldError;
use crate::systemctl::{self, Shown, SystemctlError};

/// Whose start is the end of everything that conflicts with them.
const ENDS: [&str; 4] = [
    "shutdown.target",
    "umount.target",
    "final.target",
    "kexec.target",
];

/// By these a unit stops when the named ones do (systemd.unit(5)).
const TIES: [&str; 6] = [
    "Requires",
    "Requisite",
    "BindsTo",
    "PartOf",
    "StopPropagatedFrom",
    "Slice",
];

/// Fails for the first unit that would be stopped.
pub(super) fn check(tagged: &[&str]) -> Result<(), ShieldError> {
    let ask = |units: &[&str]| {
        let properties: Vec<&str> = ["Id", "Conflicts"].into_iter().chain(TIES).collect();
        systemctl::show(units, &properties)
    };
    match first_stopped(tagged, &ask)? {
        Some((unit, by)) => Err(ShieldError::Stopped { unit, by }),
        None => Ok(()),
    }
}

type Ask<'a> = &'a dyn Fn(&[&str]) -> Result<Vec<Shown>, SystemctlError>;

/// A tagged unit, and the unit whose stop reaches it.
fn first_stopped(
    tagged: &[&str],
    ask: Ask<'_>,
) -> Result<Option<(String, String)>, SystemctlError> {
    // Each unit on its way, with the tagged one it would take along.
    let mut next: BTreeMap<String, String> = tagged
        .iter()
        .map(|u| ((*u).to_owned(), (*u).to_owned()))
        .collect();
    let mut seen = BTreeSet::new();
    while !next.is_empty() {
        let names: Vec<&str> = next.keys().map(String::as_str).collect();
        let shown = ask(&names)?;
        let mut found = BTreeMap::new();
        for unit in &shown {
            let id = unit.value("Id");
            let Some(tagged) = next.get(&id) else {
                continue;
            };
            if unit
                .words("Conflicts")
                .iter()
                .any(|u| ENDS.contains(&u.as_str()))
            {
                return Ok(Some((tagged.clone(), id)));
            }
            for tie in TIES.iter().flat_map(|key| unit.words(key)) {
                if !seen.contains(&tie) {
                    found.insert(tie, tagged.clone());
                }
            }
        }
        seen.extend(next.into_keys());
        found.retain(|unit, _| !seen.contains(unit));
        next = found;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_followed_to_the_service() {
        let text = "Id=a.service\nRequires=b.service\nSlice=system.slice\n\n\
                    Id=b.service\nBindsTo=c.mount\n\nId=c.mount\nConflicts=umount.target\n\n\
                    Id=d.service\nConflicts=rescue.target\nPartOf=d.service\n";
        let ask = |names: &[&str]| {
            let mut all = Shown::parse_all(text);
            all.retain(|unit| names.contains(&unit.value("Id").as_str()));
            Ok(all)
        };
        let stopped = |unit| first_stopped(&[unit], &ask).unwrap();
        assert_eq!(
            stopped("a.service"),
            Some(("a.service".into(), "c.mount".into()))
        );
        assert_eq!(stopped("d.service"), None);
    }
}
