//! Clients of databases: the real ones, driven through pipes.

use std::process::Command;

use anyhow::{Result, ensure};

use super::client::{Doors, Talk, Trouble, same};
use super::piped::Piped;

const POSTGRES: u16 = 5432;
const MARIADB: u16 = 3306;

fn psql(doors: &Doors) -> Result<Piped> {
    let port = doors.to(POSTGRES)?.to_string();
    Piped::start(
        Command::new("psql")
            .args(["-X", "-q", "-A", "-t", "-h", "127.0.0.1", "-U", "held"])
            .args(["-p", &port, "-v", "ON_ERROR_STOP=1", "held"]),
    )
}

/// A transaction that stays open, with a prepared statement and a temporary
/// table in it.
pub struct Transaction(Piped);

impl Transaction {
    /// Begins it.
    ///
    /// # Errors
    /// When psql does not start.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let mut psql = psql(doors)?;
        psql.say("BEGIN; CREATE TEMPORARY TABLE seen (n bigint, t text);")?;
        psql.say("PREPARE see (bigint) AS INSERT INTO seen VALUES ($1, repeat('x' || $1, 20));")?;
        psql.say("SELECT 'begun';")?;
        ensure!(psql.hear()? == "begun", "psql did not begin");
        Ok(Box::new(Transaction(psql)))
    }
}

impl Talk for Transaction {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        self.0.say(&format!("EXECUTE see ({number});"))?;
        self.0.say(
            "SELECT count(*), sum(n), (SELECT t FROM seen ORDER BY n DESC LIMIT 1), \
             now() = transaction_timestamp() FROM seen;",
        )?;
        let (count, sum) = (number + 1, number * (number + 1) / 2);
        let last = format!("x{number}").repeat(20);
        let expected = format!("{count}|{sum}|{last}|t");
        same(self.0.hear()?.as_bytes(), expected.as_bytes())
    }
}

/// A session that listens, and one that notifies it.
pub struct Listen {
    listener: Piped,
    notifier: Piped,
}

impl Listen {
    /// Starts both.
    ///
    /// # Errors
    /// When psql does not start.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let (mut listener, notifier) = (psql(doors)?, psql(doors)?);
        listener.say("LISTEN held; SELECT 'listening';")?;
        ensure!(listener.hear()? == "listening", "psql does not listen");
        Ok(Box::new(Listen { listener, notifier }))
    }
}

impl Talk for Listen {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        self.notifier
            .say(&format!("NOTIFY held, 'news-{number}'; SELECT 'told';"))?;
        let checked = same(self.notifier.hear()?.as_bytes(), b"told")?;
        // psql looks for notifications after each of its own queries.
        self.listener.say(&format!("SELECT 'asked-{number}';"))?;
        let answer = self.listener.hear()?;
        let news = self.listener.hear()?;
        let expected = format!("notification \"held\" with payload \"news-{number}\"");
        let got = news.get(13..13 + expected.len()).unwrap_or(&news);
        Ok(checked
            + same(answer.as_bytes(), format!("asked-{number}").as_bytes())?
            + same(got.as_bytes(), expected.as_bytes())?)
    }
}

/// A transaction of MariaDB's that stays open, with a prepared statement, a user
/// variable and a lock.
pub struct MariaDb(Piped);

impl MariaDb {
    /// Begins it.
    ///
    /// # Errors
    /// When the client does not start.
    pub fn open(doors: &Doors) -> Result<Box<dyn Talk>> {
        let port = doors.to(MARIADB)?.to_string();
        let mut client = Piped::start(Command::new("mariadb").args([
            "--batch",
            "--unbuffered",
            "--skip-column-names",
            "--skip-reconnect",
            "--protocol=tcp",
            "-h",
            "127.0.0.1",
            "-u",
            "held",
            "-P",
            &port,
            "held",
        ]))?;
        client.say("START TRANSACTION; DELETE FROM seen; SET @sum = 0;")?;
        client.say("PREPARE see FROM 'INSERT INTO seen VALUES (?, repeat(?, 20))';")?;
        client.say("SELECT GET_LOCK('held', 60);")?;
        ensure!(client.hear()? == "1", "the lock is somebody else's");
        Ok(Box::new(MariaDb(client)))
    }
}

impl Talk for MariaDb {
    fn turn(&mut self, number: u64) -> Result<u64, Trouble> {
        self.0.say(&format!(
            "SET @n = {number}, @t = 'x{number}', @sum = @sum + {number}; EXECUTE see USING @n, @t;"
        ))?;
        self.0.say(
            "SELECT count(*), sum(n), @sum, (SELECT t FROM seen ORDER BY n DESC LIMIT 1), \
             IS_USED_LOCK('held') = CONNECTION_ID() FROM seen;",
        )?;
        let (count, sum) = (number + 1, number * (number + 1) / 2);
        let last = format!("x{number}").repeat(20);
        let expected = format!("{count}\t{sum}\t{sum}\t{last}\t1");
        same(self.0.hear()?.as_bytes(), expected.as_bytes())
    }
}
