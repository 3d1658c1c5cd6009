//! `cargo xtask services`.

use std::cell::Cell;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use rcr_tests::services::catalog::SERVICES;
use rcr_tests::services::round::{self, Bench};
use rcr_tests::services::table::{self, Rows};
use rcr_tests::vm::qemu::Accel;

use crate::{artifacts, host, image, root, vm_dir};

/// Which services, and how often.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only services with this in their names; may be given again.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Upgrades of each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    upgrades: u32,
    /// Lists the services and runs nothing.
    #[arg(long)]
    list: bool,
}

/// The clients' programs that are not our own, and their packages.
const CLIENTS: &[(&str, &str)] = &[
    ("psql", "postgresql-client"),
    ("mariadb", "mariadb-client"),
    ("ssh", "openssh-client"),
];

/// Rows for programs, and the table made of them.
const JSON: &str = "docs/services.json";
const TABLE: &str = "docs/SERVICES.md";

/// Runs the services, group by group, and writes the table after each. Fails if
/// one was not carried that the table says is.
///
/// # Errors
/// When a step cannot be run at all.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        for service in SERVICES {
            let held: Vec<&str> = service.clients.iter().map(|(holds, _)| *holds).collect();
            println!("{:<18} {}", service.name, held.join("; "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    host::install(CLIENTS)?;
    let groups = round::groups(&arguments.only)?;
    let image = image::prepare_services()?;
    let payload = artifacts::product()?;
    let accel = Accel::detect(image.oldest())?;
    let (json, markdown) = (root().join(JSON), root().join(TABLE));
    let mut worse = false;
    for group in groups {
        let names: Vec<&str> = group.iter().map(|service| service.name).collect();
        println!("-- {}", names.join(", "));
        let start = Instant::now();
        let worse_now = Cell::new(false);
        let record = |found: &Rows| {
            let mut rows = table::read(&json)?;
            for (name, row) in found {
                let before = rows.insert(name.clone(), row.clone());
                worse_now
                    .set(worse_now.get() | (!row.carried && before.is_some_and(|b| b.carried)));
            }
            table::write(&rows, &json, &markdown)
        };
        let found = round::run(
            &Bench {
                image: &image,
                accel,
                payload: &payload,
                dir: &vm_dir().join("run/services"),
                upgrades: arguments.upgrades,
                record: &record,
            },
            &group,
        );
        worse |= worse_now.get();
        let seconds = start.elapsed().as_secs_f64();
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                println!("FAIL {} {seconds:>7.1} s\n{error:#}", names.join(", "));
                worse = true;
                continue;
            }
        };
        for (name, row) in found {
            let verdict = if row.carried { "yes" } else { "no " };
            println!("{verdict} {name:<18} {} upgrades", row.upgrades);
        }
        println!("   {seconds:.1} s");
    }
    Ok(if worse {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
