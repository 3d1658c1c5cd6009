//! A service about to be carried: what stands in its way, how large it is.

use anyhow::{Context, Result};
use rcr_engine::{OutsidePeer, Refusal, Tree};
use rcr_systemd::handover::ServiceType;
use rcr_systemd::pids::LOW;
use rcr_systemd::tags::ServiceName;
use rcr_systemd::unit::Unit;
use rcr_systemd::{process, runtime};

use crate::carrier;
use crate::exit::Refused;

/// A running service and its processes.
#[derive(Debug)]
pub struct Service {
    /// As systemd sees it.
    pub unit: Unit,
    /// Its processes, found anew at the freeze.
    pub tree: Tree,
    /// Its processes now.
    pub pids: Vec<i32>,
}

impl Service {
    /// The processes of a running unit.
    pub fn of(unit: Unit) -> Result<Self> {
        let dir = unit.cgroup_dir();
        let pids = process::in_cgroup(&dir).with_context(|| dir.display().to_string())?;
        Ok(Service {
            tree: Tree::Cgroup(dir),
            unit,
            pids,
        })
    }

    /// Brings what systemd knows of it, and its processes, up to date.
    pub fn look_again(&mut self) -> Result<()> {
        let unit = Unit::query(&ServiceName::parse(&self.unit.id)?)?;
        unit.require_running()?;
        *self = Service::of(unit)?;
        Ok(())
    }

    /// Everything that stands in the way, systemd's side first.
    pub fn refusals(&self) -> Result<Vec<Refused>> {
        Ok(self.preflight()?.0)
    }

    /// [`Self::refusals`], and connections out of the service that do not stand
    /// in the way.
    pub fn preflight(&self) -> Result<(Vec<Refused>, Vec<OutsidePeer>)> {
        let mut refusals = self.unit_refusals();
        let checked = carrier::preflight(&self.tree)?;
        refusals.extend(checked.refusals);
        let unit = self.unit.id.clone();
        let refused = refusals.into_iter().map(|refusal| Refused {
            unit: unit.clone(),
            refusal,
        });
        Ok((refused.collect(), checked.peers))
    }

    fn unit_refusals(&self) -> Vec<Refusal> {
        let unit = &self.unit;
        let mut refusals = Vec::new();
        let mut refuse = |object: &str, reason: &str, advice: &str| {
            refusals.push(Refusal {
                pid: unit.main_pid.unwrap_or(0),
                comm: unit.id.clone(),
                object: object.to_owned(),
                reason: reason.to_owned(),
                advice: advice.to_owned(),
            });
        };
        if self.pids.is_empty() {
            refuse("the service", "it has no processes", "untag the unit");
        }
        match unit.service_type {
            None => refuse(
                "its Type=",
                "this program does not know it",
                "untag the unit",
            ),
            Some(ServiceType::Oneshot) => {
                refuse(
                    "its Type=",
                    "oneshot services do not go on",
                    "untag the unit",
                );
            }
            Some(_) => {}
        }
        if let Some(socket) = unit.triggered_by.iter().find(|u| u.ends_with(".socket")) {
            refuse(
                socket,
                "systemd would open the socket a second time",
                "start the service without its socket unit, or untag it",
            );
        }
        if unit.stored_fds > 0 {
            refuse(
                &format!("{} descriptors that systemd keeps for it", unit.stored_fds),
                "they would be lost",
                "untag the unit",
            );
        }
        refusals
    }

    /// What an admin should know, though nothing stands in the way.
    pub fn warnings(&self) -> Vec<String> {
        let low: Vec<i32> = self.pids.iter().copied().filter(|pid| *pid < LOW).collect();
        if low.is_empty() {
            return Vec::new();
        }
        vec![format!(
            "{}: process ids {low:?} may be taken by early boot of the new kernel; \
             enable rcr-pids.service and restart the unit once",
            self.unit.id
        )]
    }

    /// About how many bytes its images take.
    pub fn estimate_bytes(&self) -> Result<u64> {
        let files = runtime::paths_of(&self.unit, &self.pids);
        Ok(carrier::estimate_bytes(&self.tree)? + carrier::estimate_files(&files)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(extra: &str, pids: Vec<i32>) -> Service {
        let text = format!(
            "Id=a.service\nLoadState=loaded\nActiveState=active\nSubState=running\n\
             ControlGroup=/system.slice/a.service\nMainPID=7\n{extra}"
        );
        let unit = Unit::parse("a", &text).unwrap();
        Service {
            tree: Tree::Cgroup(unit.cgroup_dir()),
            unit,
            pids,
        }
    }

    #[test]
    fn what_systemd_would_spoil_is_refused() {
        let objects = |extra: &str, pids| -> Vec<String> {
            service(extra, pids)
                .unit_refusals()
                .into_iter()
                .map(|r| r.object)
                .collect()
        };
        assert!(objects("Type=notify\n", vec![7]).is_empty());
        assert_eq!(
            objects(
                "Type=oneshot\nTriggeredBy=a.timer a.socket\nNFileDescriptorStore=2\n",
                vec![]
            ),
            [
                "the service",
                "its Type=",
                "a.socket",
                "2 descriptors that systemd keeps for it"
            ]
        );
        assert_eq!(objects("Type=new\n", vec![7]), ["its Type="]);
    }

    #[test]
    fn low_process_ids_are_warned_of() {
        assert_eq!(service("", vec![100_001]).warnings(), Vec::<String>::new());
        assert!(service("", vec![300, 100_001]).warnings()[0].contains("[300]"));
    }
}
