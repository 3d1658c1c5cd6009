//! One machine, some services, a number of upgrades.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::catalog::{SERVICES, Service};
use super::client::{Doors, Holding, Tally};
use super::sessions::ssh_key;
use super::table::{Row, Rows};
use crate::guest;
use crate::upgrade::{command, status};
use crate::vm::image::{Image, Kernel};
use crate::vm::qemu::Accel;
use crate::vm::{Crossing, Options, Vm, ready};

/// Right answers that each client must give before the first upgrade and after
/// each.
const ANSWERS: u64 = 10;

/// A service may take this long to start.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// From the command to the new boot's agent. An emulated machine with many
/// services on a busy host takes its time.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(900);

/// Waits for a boot to settle are bounded; so many of them are made.
const SETTLE_WAITS: u32 = 3;

/// What a round is made from.
pub struct Bench<'a> {
    /// The services' image.
    pub image: &'a Image,
    /// KVM or emulation.
    pub accel: Accel,
    /// The product, packed.
    pub payload: &'a Path,
    /// The machine's directory.
    pub dir: &'a Path,
    /// How many upgrades.
    pub upgrades: u32,
    /// Told the rows after each upgrade.
    pub record: &'a dyn Fn(&Rows) -> Result<()>,
}

/// A service that runs in the machine.
struct Running {
    service: &'static Service,
    row: Row,
    clients: Vec<Holding>,
    before: Vec<String>,
}

/// The catalog's services of these names (any part of one, in any case; all for
/// none), in groups that share a machine.
///
/// # Errors
/// When a name fits none.
pub fn groups(only: &[String]) -> Result<Vec<Vec<&'static Service>>> {
    for part in only {
        ensure!(
            SERVICES.iter().any(|s| fits(s, part)),
            "no service is called {part}"
        );
    }
    let wanted = |s: &&Service| only.is_empty() || only.iter().any(|part| fits(s, part));
    let numbers: BTreeSet<u8> = SERVICES.iter().filter(wanted).map(|s| s.group).collect();
    let of = |number: u8| {
        let of_group = |s: &&Service| s.group == number && wanted(s);
        SERVICES.iter().filter(of_group).collect()
    };
    Ok(numbers.into_iter().map(of).collect())
}

fn fits(service: &Service, part: &str) -> bool {
    service.name.to_lowercase().contains(&part.to_lowercase())
}

/// Runs a group and gives the rows of those services that started and whose
/// clients could connect.
///
/// # Errors
/// When the machine is lost or an upgrade does not come to an end; what a
/// service shows is in its row.
pub fn run(bench: &Bench<'_>, group: &[&'static Service]) -> Result<Rows> {
    let all = with_companions(group)?;
    let (mut vm, versions) = machine(bench, &all)?;
    let mut rows = Rows::new();
    let mut running: Vec<Running> = versions
        .into_iter()
        .map(|(service, version)| Running {
            service,
            row: fresh(service, version),
            clients: Vec::new(),
            before: Vec::new(),
        })
        .collect();
    let doors = doors(&mut vm, &running)?;
    let asked_for = |r: &Running| group.iter().any(|s| s.name == r.service.name);
    for r in running.iter_mut().filter(|r| asked_for(r)) {
        for (holds, open) in r.service.clients {
            match Holding::open(holds, *open, &doors) {
                Ok(client) => r.clients.push(client),
                Err(error) => {
                    let error = words_of(&mut vm, r.service.unit, error);
                    println!("{}: {holds}: not held: {error:#}", r.service.name);
                }
            }
        }
    }
    // What did not start or does not serve says nothing about carrying.
    running.retain(|r| !asked_for(r) || r.clients.len() == r.service.clients.len());
    for client in running.iter().flat_map(|r| &r.clients) {
        client.wait_for(ANSWERS)?;
    }
    running.retain_mut(|r| match refused(&mut vm, r.service) {
        Ok(None) => true,
        Ok(Some(reason)) => {
            println!("{}: refused\n{reason}", r.service.name);
            r.row.reason = Some(reason);
            rows.insert(r.service.name.to_owned(), close(r));
            false
        }
        Err(error) => {
            println!("{}: {error:#}", r.service.name);
            r.row.reason = Some(format!("{error:#}"));
            rows.insert(r.service.name.to_owned(), close(r));
            false
        }
    });
    for r in &running {
        guest::tag(&mut vm, &[r.service.unit])?;
    }
    let of_group = |rows: &mut Rows| rows.retain(|n, _| group.iter().any(|s| s.name == n));
    for number in 0..bench.upgrades {
        if running.is_empty() {
            break;
        }
        let kernel = match number % 2 {
            0 => bench.image.newest(),
            _ => bench.image.oldest(),
        };
        upgrade(&mut vm, kernel, &mut running, &mut rows)
            .with_context(|| format!("upgrade {} to {}", number + 1, kernel.release))?;
        let mut now = rows.clone();
        for r in &running {
            now.insert(r.service.name.to_owned(), r.row_now());
        }
        of_group(&mut now);
        (bench.record)(&now)?;
    }
    for mut r in running {
        rows.insert(r.service.name.to_owned(), close(&mut r));
    }
    of_group(&mut rows);
    (bench.record)(&rows)?;
    Ok(rows)
}

/// A machine in which the services run, and their versions. Starting them takes
/// an emulated machine long: once all of them run it is kept for the next time.
fn machine(
    bench: &Bench<'_>,
    services: &[&'static Service],
) -> Result<(Vm, Vec<(&'static Service, String)>)> {
    let options = Options {
        image: bench.image,
        kernel: bench.image.oldest(),
        accel: bench.accel,
        dir: bench.dir,
        payload: Some(bench.payload),
        detached: false,
        cmpxchg16b: services.iter().any(|service| service.cmpxchg16b),
    };
    let key = ssh_identity()?;
    let mut hasher = DefaultHasher::new();
    for s in services {
        (s.name, s.unit, s.setup, s.after).hash(&mut hasher);
    }
    let name = format!("started-{:016x}", hasher.finish());
    let begin = Instant::now();
    if let Some(mut vm) = ready::resume(&options, &name)? {
        guest::enable_product(&mut vm)?;
        // The key is this run's.
        vm.write_file("/root/held.pub", key.as_bytes(), 0o644)?;
        vm.sh("k=/home/held/.ssh/authorized_keys; \
             [ ! -e $k ] || install -m 600 -o held -g held /root/held.pub $k")?;
        let mut running = Vec::new();
        for service in services {
            running.push((*service, version(&mut vm, service)?));
        }
        println!("resumed after {:.0?}", begin.elapsed());
        return Ok((vm, running));
    }
    println!("no machine is kept as {name}");
    let mut vm = Vm::start(&options)?;
    println!("the machine runs after {:.0?}", begin.elapsed());
    guest::enable_product(&mut vm)?;
    vm.write_file("/root/held.pub", key.as_bytes(), 0o644)?;
    let running = start_all(&mut vm, services)?;
    println!("the services run after {:.0?}", begin.elapsed());
    if running.len() == services.len() {
        ready::keep(&mut vm, &options, &name)?;
        println!("the machine is kept after {:.0?}", begin.elapsed());
    }
    Ok((vm, running))
}

/// Sets all up, starts them at once, and gives those that run with their
/// versions.
fn start_all(
    vm: &mut Vm,
    services: &[&'static Service],
) -> Result<Vec<(&'static Service, String)>> {
    let mut set_up = Vec::new();
    for service in services {
        match sh(vm, &format!("set -e\n{}", service.setup)) {
            Ok(_) => set_up.push(*service),
            Err(error) => println!("{}: is not set up: {error:#}", service.name),
        }
    }
    let mut restart = vec!["systemctl", "restart", "--no-block"];
    restart.extend(set_up.iter().map(|service| service.unit));
    vm.exec(&restart)?;
    let mut running = Vec::new();
    for service in set_up {
        match started(vm, service) {
            Ok(version) => {
                println!("{} {version} runs", service.name);
                running.push((service, version));
            }
            Err(error) => {
                println!("{}: does not start: {error:#}", service.name);
                // It would start again and again.
                vm.run(&["systemctl", "stop", "--no-block", service.unit])?;
            }
        }
    }
    Ok(running)
}

/// A group with what its members need, which comes first.
fn with_companions(group: &[&'static Service]) -> Result<Vec<&'static Service>> {
    let mut all: Vec<&'static Service> = Vec::new();
    let mut todo: Vec<&'static Service> = group.to_vec();
    while let Some(service) = todo.pop() {
        all.retain(|s| s.name != service.name);
        all.insert(0, service);
        for name in service.with {
            let found = SERVICES.iter().find(|s| s.name == *name);
            todo.push(found.with_context(|| format!("{name} is not in the catalog"))?);
        }
    }
    Ok(all)
}

fn fresh(service: &Service, version: String) -> Row {
    Row {
        carried: false,
        version,
        held: service
            .clients
            .iter()
            .map(|(h, _)| (*h).to_owned())
            .collect(),
        upgrades: 0,
        resets: 0,
        wrong: 0,
        bytes: 0,
        longest_s: 0.0,
        needs: service.needs.iter().map(|n| (*n).to_owned()).collect(),
        reason: None,
    }
}

/// Waits for a service to start and completes its set-up; gives its package's
/// version.
fn started(vm: &mut Vm, service: &Service) -> Result<String> {
    let unit = service.unit;
    let script = format!(
        "systemctl start {unit} || {{ journalctl -b --no-pager -n 20 -u {unit}; exit 1; }}"
    );
    sh(vm, &script)?;
    if !service.after.is_empty() {
        sh(vm, &format!("set -e\n{}", service.after))?;
    }
    version(vm, service)
}

fn version(vm: &mut Vm, service: &Service) -> Result<String> {
    vm.sh(&format!(
        "dpkg-query -W -f '${{Version}}' {} | sed 's/^[0-9]*://; s/[-+~].*//'",
        service.package
    ))
}

fn sh(vm: &mut Vm, script: &str) -> Result<String> {
    let exit = vm.run_with(&["bash", "-c", script], &[], START_TIMEOUT)?;
    ensure!(
        exit.success(),
        "{}\n{}\n{}",
        exit.how(),
        exit.out(),
        exit.err()
    );
    Ok(exit.out())
}

fn doors(vm: &mut Vm, running: &[Running]) -> Result<Doors> {
    let mut doors = Doors::default();
    for port in running.iter().flat_map(|r| r.service.ports) {
        if !doors.0.contains_key(port) {
            doors.0.insert(*port, vm.forward(*port)?);
        }
    }
    Ok(doors)
}

/// A key of our own; its public half.
fn ssh_identity() -> Result<String> {
    let path = ssh_key();
    if !path.exists() {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&path)
            .status()
            .context("starting ssh-keygen")?;
        ensure!(made.success(), "ssh-keygen failed: {made}");
    }
    let public = path.with_extension("key.pub");
    std::fs::read_to_string(&public).with_context(|| public.display().to_string())
}

/// Why a unit would not be carried, if so.
fn refused(vm: &mut Vm, service: &Service) -> Result<Option<String>> {
    let exit = vm.run(&["rcr", "check", "--json", service.unit])?;
    match exit.code {
        Some(0) => Ok(None),
        Some(guest::EXIT_REFUSED) => {
            let said: Value = serde_json::from_str(&exit.out()).context("rcr check --json")?;
            let lines: BTreeSet<String> = said["refusals"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|r| {
                    let text = |name: &str| r[name].as_str().unwrap_or_default().to_owned();
                    format!("{}: {}: {}", text("comm"), text("object"), text("reason"))
                })
                .collect();
            Ok(Some(Vec::from_iter(lines).join("\n")))
        }
        _ => bail!("rcr check {}: {} {}", exit.how(), exit.out(), exit.err()),
    }
}

/// What must not change about a unit, a line each.
fn facts(vm: &mut Vm, unit: &str) -> Result<Vec<String>> {
    let shown = vm.exec(&[
        "systemctl",
        "show",
        "--property=ActiveState,MainPID,NRestarts",
        unit,
    ])?;
    Ok(shown.lines().map(str::to_owned).collect())
}

/// One upgrade. What the dump itself refuses is left behind, with its row.
fn upgrade(
    vm: &mut Vm,
    kernel: &Kernel,
    running: &mut Vec<Running>,
    rows: &mut Rows,
) -> Result<()> {
    for r in running.iter_mut() {
        r.before = facts(vm, r.service.unit)?;
    }
    let begin = Instant::now();
    loop {
        let exit = match vm.exec_across(&command(kernel, &[]), UPGRADE_TIMEOUT)? {
            Crossing::Jumped(boot) => {
                ensure!(boot.kernel == kernel.release, "{} runs", boot.kernel);
                break;
            }
            Crossing::Returned(exit) => exit,
        };
        let said = format!("{}\n{}", exit.out(), exit.err());
        println!("rcr-upgrade {}:\n{said}", exit.how());
        let named = |r: &Running| said.contains(r.service.unit);
        ensure!(running.iter().any(named), "rcr-upgrade names no service");
        for mut r in running.extract_if(.., |r| said.contains(r.service.unit)) {
            let lines = said.lines().filter(|line| line.contains(r.service.unit));
            r.row.reason = Some(Vec::from_iter(lines).join("\n"));
            guest::untag(vm, &[r.service.unit])?;
            rows.insert(r.service.name.to_owned(), close(&mut r));
        }
        if running.is_empty() {
            return Ok(());
        }
    }
    println!("{} answers after {:.0?}", kernel.release, begin.elapsed());
    settle(vm)?;
    println!("it has settled after {:.0?}", begin.elapsed());
    let status = status(vm)?;
    println!("rcr status: {} {}", status["outcome"], status["reason"]);
    for r in running.iter_mut() {
        let mut troubles = Vec::new();
        let after = facts(vm, r.service.unit)?;
        for (was, is) in r.before.iter().zip(&after) {
            if was != is {
                troubles.push(format!("{was} became {is}"));
            }
        }
        // Nothing answers for a unit that is gone, however long one waits.
        let there = after.iter().any(|line| line == "ActiveState=active");
        for client in &r.clients {
            if there && let Err(error) = client.wait_for(ANSWERS) {
                troubles.push(format!("no answer any more: {error:#}"));
            }
            let tally = client.tally();
            if tally.resets + tally.wrong > 0 {
                troubles.push(format!(
                    "{}: {}",
                    client.holds,
                    tally.first_trouble.unwrap_or_default()
                ));
            }
        }
        r.row.upgrades += 1;
        if troubles.is_empty() {
            println!("{}: carried", r.service.name);
        } else {
            let text = troubles.join("\n");
            println!("{}: {text}", r.service.name);
            let words = words_of(vm, r.service.unit, anyhow::anyhow!("its words"));
            println!("{words:#}");
            r.row.reason.get_or_insert(text);
        }
    }
    Ok(())
}

/// Waits until no start job is left.
fn settle(vm: &mut Vm) -> Result<()> {
    let mut waits = 1;
    while let Err(error) = vm.wait_settled() {
        if waits == SETTLE_WAITS {
            return Err(error);
        }
        waits += 1;
    }
    Ok(())
}

impl Running {
    /// Its row as it would be if it ended now.
    fn row_now(&self) -> Row {
        let mut row = self.row.clone();
        for tally in self.clients.iter().map(Holding::tally) {
            add(&mut row, &tally);
        }
        judge(&mut row);
        row
    }
}

fn add(row: &mut Row, tally: &Tally) {
    row.resets += tally.resets;
    row.wrong += tally.wrong;
    row.bytes += tally.bytes;
    row.longest_s = row.longest_s.max(tally.longest.as_secs_f64());
}

fn judge(row: &mut Row) {
    row.carried = row.upgrades > 0 && row.reason.is_none() && row.resets + row.wrong == 0;
}

/// Ends a service's clients and completes its row.
fn close(r: &mut Running) -> Row {
    let mut row = r.row.clone();
    for client in r.clients.drain(..) {
        match client.finish() {
            Ok(tally) => add(&mut row, &tally),
            Err(error) => {
                row.reason.get_or_insert(format!("{error:#}"));
            }
        }
    }
    judge(&mut row);
    row
}

/// Adds what the guest's logs say about a unit to an error.
fn words_of(vm: &mut Vm, unit: &str, error: anyhow::Error) -> anyhow::Error {
    let script = format!(
        "systemctl status --no-pager -n 5 {unit}; journalctl -b --no-pager -n 20 -u {unit}; \
         journalctl -b --no-pager -o short-monotonic | grep -i rcr | tail -20; ss -tnp | head -30"
    );
    match vm.run(&["sh", "-c", &script]) {
        Ok(exit) => anyhow::anyhow!("{error:#}\nThe guest says:\n{}\n{}", exit.out(), exit.err()),
        Err(_) => error,
    }
}
