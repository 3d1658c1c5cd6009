//! The order of the stages, and what is left after each failure.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use anyhow::bail;
use rcr_engine::image::{Generation, ImageSink, ImageSource};
use rcr_pmem_store::{Nonce, Reader, Writer};
use rcr_systemd::handover::{
    AdoptionRecord, MANIFEST_IMAGE, Manifest, Outcome, PseudoMount, Report, ServiceOutcome,
    ServiceType, UnitPlan,
};

use super::cleanup;
use super::fail::FailAt;
use super::ground::Ground;
use super::host::Host;
use super::journey::Journey;
use super::restorer::{Restorer, Standing};
use crate::progress::{Made, Progress};

const NONCE: Nonce = [0xab; 16];
const UNITS: [&str; 2] = ["a.service", "b.service"];

type Events = Rc<RefCell<Vec<String>>>;

/// A host that only writes down what is done to it.
struct Paper(Events);

impl Ground for Paper {
    fn prepare(&self, _: &[PseudoMount]) -> anyhow::Result<()> {
        self.0.borrow_mut().push("prepare".into());
        Ok(())
    }

    fn make_cgroup(&self, dir: &Path) -> anyhow::Result<()> {
        self.0.borrow_mut().push(format!("make {}", dir.display()));
        Ok(())
    }

    fn clear_cgroup(&self, dir: &Path) -> anyhow::Result<()> {
        self.0.borrow_mut().push(format!("clear {}", dir.display()));
        Ok(())
    }

    fn clear_file(&self, path: &Path) -> anyhow::Result<()> {
        self.0
            .borrow_mut()
            .push(format!("remove {}", path.display()));
        Ok(())
    }
}

/// An engine that restores names.
struct Names {
    events: Events,
    bad_resume: Option<&'static str>,
}

struct Name {
    events: Events,
    unit: String,
    bad_resume: bool,
    resumed: bool,
}

impl Restorer for Names {
    fn restore(
        &mut self,
        plan: &UnitPlan,
        images: &dyn ImageSource,
        _output: &Path,
    ) -> anyhow::Result<Box<dyn Standing>> {
        if images.get("core")? != Some(plan.unit.as_bytes()) {
            bail!("not this unit's images");
        }
        self.events
            .borrow_mut()
            .push(format!("restore {}", plan.unit));
        Ok(Box::new(Name {
            events: self.events.clone(),
            unit: plan.unit.clone(),
            bad_resume: self.bad_resume == Some(plan.unit.as_str()),
            resumed: false,
        }))
    }
}

impl Standing for Name {
    fn resume(mut self: Box<Self>) -> anyhow::Result<()> {
        if self.bad_resume {
            bail!("it does not run");
        }
        self.resumed = true;
        self.events
            .borrow_mut()
            .push(format!("resume {}", self.unit));
        Ok(())
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if !self.resumed {
            self.events.borrow_mut().push(format!("kill {}", self.unit));
        }
    }
}

struct Scene {
    _dir: tempfile::TempDir,
    host: Host,
    events: Events,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Host {
            cgroup_root: "/cg".into(),
            run_dir: dir.path().join("rcr"),
        };
        Scene {
            _dir: dir,
            host,
            events: Events::default(),
        }
    }

    fn run(&self, fail_at: &str, store: Vec<u8>, bad_resume: Option<&'static str>) -> Report {
        let paper = Paper(self.events.clone());
        let fail_at = FailAt::parse(Some(fail_at));
        let mut journey = Journey::new(&self.host, &paper, fail_at, "7.3".into());
        let found = journey.find(|| Ok(Reader::open(store, &NONCE)?));
        let mut names = Names {
            events: self.events.clone(),
            bad_resume,
        };
        match found {
            Ok(found) => journey.restore_all(found, &NONCE, &mut names),
            Err(error) => Report::lost("7.3", &format!("{error:#}")),
        }
    }

    fn events(&self) -> Vec<String> {
        self.events.borrow().clone()
    }

    fn recorded(&self) -> Vec<String> {
        let records = AdoptionRecord::read_all_in(&self.host.restored_dir()).unwrap();
        records.into_iter().map(|record| record.unit).collect()
    }
}

fn manifest() -> Manifest {
    let plan = |unit: &str| UnitPlan {
        unit: unit.into(),
        cgroup: format!("/system.slice/{unit}"),
        slice: "system.slice".into(),
        main_pid: Some(100_001),
        service_type: ServiceType::Simple,
        pid_file: None,
        image_prefix: UnitPlan::prefix_of(unit),
        pids: vec![100_001],
        runtime_paths: vec![format!("/run/{unit}")],
        syslog_identifier: String::new(),
        journal_streams: Vec::new(),
        ahead: Vec::new(),
    };
    Manifest {
        format: rcr_systemd::handover::FORMAT_VERSION,
        nonce: "ab".repeat(16),
        kernel_before: "6.12".into(),
        kernel_after: "7.3".into(),
        boot_id: String::new(),
        started_ms: 1,
        frozen_ms: 2,
        units: UNITS.iter().map(|unit| plan(unit)).collect(),
        lost: Vec::new(),
        pseudo_mounts: Vec::new(),
        stages: Vec::new(),
    }
}

fn made(unit: &str) -> Made {
    Made {
        unit: unit.into(),
        cgroup: format!("/cg/{unit}").into(),
        files: vec![format!("/run/{unit}").into()],
    }
}

fn store_of(manifest: &Manifest) -> Vec<u8> {
    let mut writer = Writer::create(vec![0; 1 << 20], NONCE).unwrap();
    for unit in UNITS {
        Generation::new(&mut writer, UnitPlan::prefix_of(unit))
            .put("core", unit.as_bytes())
            .unwrap();
    }
    writer.put(MANIFEST_IMAGE, &manifest.to_bytes()).unwrap();
    writer.seal().unwrap()
}

#[test]
fn all_units_stand_before_one_runs() {
    let scene = Scene::new();
    let report = scene.run("", store_of(&manifest()), None);
    assert_eq!(
        scene.events(),
        [
            "prepare",
            "make /cg/system.slice/a.service",
            "restore a.service",
            "make /cg/system.slice/b.service",
            "restore b.service",
            "resume a.service",
            "resume b.service",
        ]
    );
    assert_eq!(report.outcome, Outcome::Carried, "{}", report.reason);
    assert!(report.resumed_ms.is_some());
    assert_eq!(scene.recorded(), UNITS);
    let stages: Vec<_> = report
        .stages
        .iter()
        .map(|stage| stage.name.as_str())
        .collect();
    let restores = ["restore a.service", "restore b.service"];
    assert_eq!(stages[..3], ["find", "verify", "prepare"]);
    assert_eq!(stages[3..5], restores);
    assert_eq!(stages[5..], ["consume", "resume"]);
}

#[test]
fn a_failure_before_the_first_unit_touches_nothing() {
    for (stage, events) in [("find", 0), ("verify", 0), ("prepare", 0)] {
        let scene = Scene::new();
        let report = scene.run(stage, store_of(&manifest()), None);
        assert_eq!(report.outcome, Outcome::ColdStart);
        assert!(report.reason.starts_with(stage), "{}", report.reason);
        assert_eq!(scene.events().len(), events, "{stage}");
        assert!(scene.recorded().is_empty());
    }
}

#[test]
fn a_unit_that_fails_leaves_the_other_alone() {
    let scene = Scene::new();
    let report = scene.run("restore:a.service", store_of(&manifest()), None);
    let outcomes: Vec<_> = report
        .services
        .iter()
        .map(|service| service.outcome)
        .collect();
    assert_eq!(outcomes, [ServiceOutcome::Cold, ServiceOutcome::Kept]);
    assert_eq!(report.outcome, Outcome::ColdStart);
    assert_eq!(scene.recorded(), ["b.service"]);
}

#[test]
fn a_store_that_cannot_be_consumed_is_not_resumed() {
    let scene = Scene::new();
    let report = scene.run("consume", store_of(&manifest()), None);
    assert_eq!(report.outcome, Outcome::ColdStart);
    let events = scene.events();
    assert!(events.contains(&"kill a.service".into()) && events.contains(&"kill b.service".into()));
    assert!(events.contains(&"clear /cg/system.slice/b.service".into()));
    assert!(!events.iter().any(|event| event.starts_with("resume")));
    assert!(scene.recorded().is_empty());
}

#[test]
fn a_unit_that_does_not_resume_has_no_record() {
    let scene = Scene::new();
    let report = scene.run("", store_of(&manifest()), Some("a.service"));
    assert_eq!(scene.recorded(), ["b.service"]);
    assert_eq!(report.services[0].outcome, ServiceOutcome::Cold);
    let events = scene.events();
    let killed = events.iter().position(|e| e == "kill a.service").unwrap();
    assert_eq!(events[killed + 1], "clear /cg/system.slice/a.service");
}

#[test]
fn bad_stores_start_cold() {
    let mut torn = store_of(&manifest());
    let at = torn.windows(9).position(|w| w == b"b.service").unwrap();
    torn[at] ^= 1;
    let mut foreign_nonce = manifest();
    foreign_nonce.nonce = "00".repeat(16);
    let mut outside = manifest();
    outside.units[0].cgroup = "/../x".into();
    let mut path_name = manifest();
    path_name.units[1].unit = "../b".into();
    let consumed = {
        let mut reader = Reader::open(store_of(&manifest()), &NONCE).unwrap();
        reader.mark_consumed().unwrap();
        reader.into_region()
    };
    let stores = [
        torn,
        consumed,
        vec![0; 1 << 20],
        store_of(&foreign_nonce),
        store_of(&outside),
        store_of(&path_name),
    ];
    for (number, store) in stores.into_iter().enumerate() {
        let scene = Scene::new();
        let report = scene.run("", store, None);
        assert_eq!(report.outcome, Outcome::ColdStart, "store {number}");
        assert!(!report.reason.is_empty());
        assert!(
            scene.events().is_empty(),
            "store {number}: {:?}",
            scene.events()
        );
    }
}

#[test]
fn what_a_dead_worker_left_is_cleaned_up() {
    let scene = Scene::new();
    let paper = Paper(scene.events.clone());
    let progress = Progress {
        stage: "restore b.service".into(),
        made: vec![made("a.service"), made("b.service")],
        resumed: false,
        report: Some(Report::cold(&manifest(), "cut off")),
    };
    progress.write(&scene.host.run_dir).unwrap();
    AdoptionRecord::from_plan(&manifest().units[0], None)
        .write_in(&scene.host.restored_dir())
        .unwrap();
    let report = cleanup::after(&scene.host, &paper, "the restorer died")
        .unwrap()
        .unwrap();
    assert_eq!(
        scene.events(),
        [
            "clear /cg/a.service",
            "remove /run/a.service",
            "clear /cg/b.service",
            "remove /run/b.service"
        ]
    );
    assert!(scene.recorded().is_empty());
    assert_eq!(
        report.reason,
        "the restorer died at stage 'restore b.service'"
    );
    assert!(
        report
            .services
            .iter()
            .all(|s| s.outcome == ServiceOutcome::Cold)
    );
}

#[test]
fn resumed_services_survive_a_dead_worker() {
    let scene = Scene::new();
    let paper = Paper(scene.events.clone());
    let mut report = Report::cold(&manifest(), "cut off");
    UNITS.iter().for_each(|unit| report.kept(unit, Some(1)));
    let progress = Progress {
        stage: "resume".into(),
        made: vec![made("a.service")],
        resumed: true,
        report: Some(report.clone()),
    };
    progress.write(&scene.host.run_dir).unwrap();
    let after = cleanup::after(&scene.host, &paper, "the restorer died").unwrap();
    assert_eq!(after, Some(report));
    assert!(scene.events().is_empty());
}
