//! `cargo xtask demo`: the kernel is replaced under a live Redis and nginx.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rcr_tests::dataset::Dataset;
use rcr_tests::facts::{NGINX_UNIT, REDIS_UNIT};
use rcr_tests::guest;
use rcr_tests::upgrade::Upgrade;
use rcr_tests::vm::console::Console;
use rcr_tests::vm::qemu::Accel;
use rcr_tests::vm::{Options, Vm};
use serde_json::{Value, json};

use crate::{artifacts, image, vm_dir};

/// Runs it; the exit code says whether everything is as it was.
///
/// # Errors
/// When the upgrade does not get as far as a new boot.
pub fn run(json: Option<&Path>) -> Result<ExitCode> {
    let image = image::prepare()?;
    let payload = artifacts::product()?;
    let (old, new) = (image.oldest(), image.newest());
    let accel = Accel::detect(old)?;
    println!(
        "Starting a Debian guest with kernel {} ({})",
        old.release,
        accel.name()
    );
    let dir = vm_dir().join("run/demo");
    let options = Options {
        image: &image,
        kernel: old,
        accel,
        dir: &dir,
        payload: Some(&payload),
        detached: false,
        cmpxchg16b: false,
    };
    let mut vm = Vm::start(&options)?;
    guest::install_product(&mut vm)?;
    let dataset = Dataset::LARGE;
    println!("Filling Redis with {} keys", dataset.keys);
    dataset.fill(vm.ports().redis)?;
    println!("Tagging {REDIS_UNIT} and {NGINX_UNIT}");
    guest::tag(&mut vm, &[REDIS_UNIT, NGINX_UNIT])?;
    println!(
        "Upgrading to kernel {}; the guest's console says:",
        new.release
    );
    let follower = Follower::start(vm.console());
    let upgrade = Upgrade::run(&mut vm, new, dataset, &[]);
    follower.stop();
    let upgrade = upgrade?;
    let differences = upgrade.differences(new);
    print_table(&upgrade, &differences);
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&to_json(&upgrade, &differences))?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    vm.stop()?;
    Ok(if differences.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print_table(upgrade: &Upgrade, differences: &[String]) {
    let (before, after) = (&upgrade.before, &upgrade.after);
    let mut rows = vec![["".into(), "before".into(), "after".into()]];
    let mut row = |name: &str, before: String, after: String| {
        rows.push([name.to_owned(), before, after]);
    };
    row("kernel", before.kernel.clone(), after.kernel.clone());
    for (old, new) in before.services.iter().zip(&after.services) {
        row(
            &format!("{} MainPID", old.unit),
            old.main_pid.to_string(),
            new.main_pid.to_string(),
        );
        row(
            &format!("{} processes", old.unit),
            list(&old.pids),
            list(&new.pids),
        );
        row(
            &format!("{} is-active", old.unit),
            old.active.clone(),
            new.active.clone(),
        );
    }
    let (old, new) = (&before.redis, &after.redis);
    row(
        "redis run_id",
        old.run_id[..12].to_owned(),
        new.run_id[..12].to_owned(),
    );
    row(
        "redis uptime_in_seconds",
        old.uptime_s.to_string(),
        new.uptime_s.to_string(),
    );
    row("redis keys", old.keys.to_string(), new.keys.to_string());
    row("redis checksum", old.checksum.clone(), new.checksum.clone());
    row(
        "MemTotal, MiB",
        mib(before.mem_total_kib),
        mib(after.mem_total_kib),
    );
    println!();
    for [name, before, after] in &rows {
        println!("{name:<34} {before:<24} {after}");
    }
    println!("\n{:<34} {:>10}", "blackout, as seen from outside", "ms");
    println!(
        "{:<34} {:>10}",
        "redis",
        upgrade.redis.longest_gap.as_millis()
    );
    println!(
        "{:<34} {:>10}",
        "nginx",
        upgrade.nginx.longest_gap.as_millis()
    );
    println!("\n{:<34} {:>10}", "stage", "ms");
    for stage in stages(upgrade) {
        let name = stage["name"].as_str().unwrap_or_default();
        let side = stage["side"].as_str().unwrap_or_default();
        println!(
            "{:<34} {:>10}",
            format!("{name} ({side} kernel)"),
            stage["ms"]
        );
    }
    println!();
    if differences.is_empty() {
        println!("Redis and nginx crossed and did not notice.");
    }
    for difference in differences {
        println!("DIFFERENT: {difference}");
    }
}

fn stages(upgrade: &Upgrade) -> &[Value] {
    upgrade.status["stages"]
        .as_array()
        .map_or(&[], Vec::as_slice)
}

fn list(pids: &[u32]) -> String {
    pids.iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}

fn mib(kib: u64) -> String {
    (kib / 1024).to_string()
}

fn to_json(upgrade: &Upgrade, differences: &[String]) -> Value {
    let (before, after) = (&upgrade.before, &upgrade.after);
    let services: Vec<Value> = before
        .services
        .iter()
        .zip(&after.services)
        .map(|(old, new)| {
            json!({
                "unit": old.unit,
                "main_pid_before": old.main_pid,
                "main_pid_after": new.main_pid,
                "pids_before": old.pids,
                "pids_after": new.pids,
                "active_before": old.active,
                "active_after": new.active,
                "kept": old == new,
            })
        })
        .collect();
    json!({
        "ok": differences.is_empty(),
        "differences": differences,
        "kernel_before": before.kernel,
        "kernel_after": after.kernel,
        "services": services,
        "redis_before": before.redis,
        "redis_after": after.redis,
        "mem_total_kib_before": before.mem_total_kib,
        "mem_total_kib_after": after.mem_total_kib,
        "blackout_ms": {
            "total": millis(upgrade.blackout()),
            "redis": millis(upgrade.redis.longest_gap),
            "nginx": millis(upgrade.nginx.longest_gap),
            "stages": stages(upgrade),
        },
    })
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Prints the console's lines that tell how far the upgrade is.
struct Follower {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Follower {
    fn start(mut console: Console) -> Follower {
        console.skip_to_end();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            loop {
                let last = stopped.load(Ordering::Relaxed);
                for line in console.new_lines().unwrap_or_default() {
                    if tells_progress(&line) {
                        let seconds = start.elapsed().as_secs_f64();
                        println!("{seconds:>7.1} s  {:.110}", line.trim());
                    }
                }
                if last {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Follower { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        // It only prints; there is nothing to lose.
        let _ = self.thread.join();
    }
}

/// Lines of the product's own and of the kernel's that mark a step.
fn tells_progress(line: &str) -> bool {
    const STEPS: [&str; 10] = [
        "rcr: ",
        "rcr-upgrade: ",
        "the jump is under way",
        "Rebooting with kexec",
        "Linux version",
        "Welcome to",
        "target multi-user.target",
        "Kernel panic",
        "Oops:",
        "BUG:",
    ];
    STEPS.iter().any(|step| line.contains(step))
}
