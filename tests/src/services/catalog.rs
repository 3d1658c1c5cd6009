//! The services that are shown, with what each needs beyond its package and
//! which clients hold connections to it.
//!
//! Set-ups allow access from outside the guest and keep idle connections for
//! longer than an emulated machine is silent; the rest is as packaged.

use super::caches::{Memcached, Pipelined, PubSub};
use super::client::{Doors, Open, Talk};
use super::databases::{Listen, MariaDb, Transaction};
use super::http::{Crowd, Download, KeptAlive, WebSocket, held_page};
use super::messages::{Mqtt, Stomp};
use super::sessions::{Dns, Forward, Idle, Shell};

/// A service and its clients.
pub struct Service {
    /// Its name in the table and on the command line.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The package whose version is shown.
    pub package: &'static str,
    /// Services with the same number share a machine.
    pub group: u8,
    /// Other services of the catalog that its clients need: they are tagged too.
    pub with: &'static [&'static str],
    /// It uses the instruction cmpxchg16b.
    pub cmpxchg16b: bool,
    /// Settings without which it is refused, for people; `setup` makes them.
    pub needs: &'static [&'static str],
    /// Run in the guest before the unit is started.
    pub setup: &'static str,
    /// Run in the guest once it runs.
    pub after: &'static str,
    /// Ports of the guest that its clients go to.
    pub ports: &'static [u16],
    /// Its clients: what each holds and how it connects.
    pub clients: &'static [(&'static str, Open)],
}

const NONE: Service = Service {
    name: "",
    unit: "",
    package: "",
    group: 0,
    with: &[],
    cmpxchg16b: false,
    needs: &[],
    setup: "",
    after: "",
    ports: &[],
    clients: &[],
};

/// A kept-alive connection that asks for the same page.
macro_rules! page {
    ($port:literal) => {
        (
            "a kept-alive connection",
            (|doors: &Doors| KeptAlive::open(doors, $port, held_page)) as Open,
        )
    };
}

fn memcached(doors: &Doors) -> anyhow::Result<Box<dyn Talk>> {
    Memcached::open(doors, 11211)
}

/// Every service.
pub const SERVICES: &[Service] = &[
    Service {
        name: "memcached",
        unit: "memcached.service",
        package: "memcached",
        group: 1,
        setup: "sed -i 's/^-l .*/-l 0.0.0.0/' /etc/memcached.conf",
        ports: &[11211],
        clients: &[("values set and read, a counter", memcached)],
        ..NONE
    },
    Service {
        name: "PostgreSQL",
        unit: "postgresql@17-main.service",
        package: "postgresql-17",
        group: 2,
        setup: "cd /etc/postgresql/17/main && echo \"listen_addresses = '*'\" >>postgresql.conf && \
                echo 'host all held 10.0.2.2/32 trust' >>pg_hba.conf",
        after: "runuser -u postgres -- psql -q -c 'CREATE ROLE held LOGIN' \
                -c 'CREATE DATABASE held OWNER held'",
        ports: &[5432],
        clients: &[
            (
                "an open transaction with a temporary table and a prepared statement (psql)",
                Transaction::open as Open,
            ),
            ("LISTEN (psql)", Listen::open),
        ],
        ..NONE
    },
    Service {
        name: "MariaDB",
        unit: "mariadb.service",
        package: "mariadb-server",
        group: 2,
        needs: &["`MemoryPressureWatch=off` (its trigger is told by no kernel)"],
        setup: "sed -i 's/^bind-address.*/bind-address = 0.0.0.0/' \
                /etc/mysql/mariadb.conf.d/50-server.cnf; mkdir -p /etc/systemd/system/mariadb.service.d; \
                printf '[Service]\\nMemoryPressureWatch=off\\n' \
                >/etc/systemd/system/mariadb.service.d/held.conf; systemctl daemon-reload",
        after: "mariadb -e \"CREATE DATABASE held; CREATE USER held@'10.0.2.2'; \
                GRANT ALL ON held.* TO held@'10.0.2.2'; \
                CREATE TABLE held.seen (n bigint, t text)\"",
        ports: &[3306],
        clients: &[(
            "an open transaction with a prepared statement, variables and a lock (mariadb)",
            MariaDb::open,
        )],
        ..NONE
    },
    Service {
        name: "Apache",
        unit: "apache2.service",
        package: "apache2",
        group: 2,
        setup: concat!(
            "printf 'KeepAliveTimeout 600\\nMaxKeepAliveRequests 0\\nTimeout 600\\n' \
             >/etc/apache2/conf-enabled/patient.conf; \
             sed -i 's/^Listen 80$/Listen 8081/' /etc/apache2/ports.conf; \
             sed -i 's/:80>/:8081>/' /etc/apache2/sites-available/000-default.conf; ",
            "d=/var/www/html; mkdir -p $d; for i in $(seq -w 0 255); do \
             echo \"line-$i-of-a-page\"; done >$d/held; \
             awk 'BEGIN { for (i = 0; i < 1000000; i++) printf \"%015d\\n\", i }' >$d/numbers"
        ),
        ports: &[8081],
        clients: &[
            page!(8081),
            ("a slow download in flight", |doors| {
                Download::open(doors, 8081)
            }),
        ],
        ..NONE
    },
    Service {
        name: "HAProxy",
        unit: "haproxy.service",
        package: "haproxy",
        cmpxchg16b: true,
        group: 3,
        with: &["memcached"],
        setup: "printf 'frontend held\\n mode tcp\\n option tcplog\\n timeout client 1h\\n bind :7000\\n \
                default_backend held\\nbackend held\\n mode tcp\\n timeout server 1h\\n \
                server s 127.0.0.1:11211\\n' >>/etc/haproxy/haproxy.cfg",
        ports: &[7000],
        clients: &[("a proxied connection to memcached", |doors| {
            Memcached::open(doors, 7000)
        })],
        ..NONE
    },
    Service {
        name: "Mosquitto",
        unit: "mosquitto.service",
        package: "mosquitto",
        group: 1,
        setup: "printf 'listener 1883 0.0.0.0\\nallow_anonymous true\\n' \
                >/etc/mosquitto/conf.d/held.conf",
        ports: &[1883],
        clients: &[
            ("MQTT, quality of service 1, a message in flight", |doors| {
                Mqtt::open(doors, 1883)
            }),
        ],
        ..NONE
    },
    Service {
        name: "Redis",
        unit: "redis-server.service",
        package: "redis-server",
        group: 1,
        ports: &[6379],
        clients: &[
            ("pipelined INCR", |doors| Pipelined::open(doors, 6379)),
            ("publish and subscribe", |doors| PubSub::open(doors, 6379)),
        ],
        ..NONE
    },
    Service {
        name: "Valkey",
        unit: "valkey-server.service",
        package: "valkey-server",
        group: 1,
        setup: "sed -i 's/^port .*/port 6380/; s/^protected-mode .*/protected-mode no/; \
                s/^bind .*/bind 0.0.0.0/' /etc/valkey/valkey.conf",
        ports: &[6380],
        clients: &[("pipelined INCR", |doors| Pipelined::open(doors, 6380))],
        ..NONE
    },
    Service {
        name: "Node.js",
        unit: "held-node.service",
        package: "nodejs",
        group: 1,
        setup: NODE,
        ports: &[8082],
        clients: &[
            page!(8082),
            ("a websocket", |doors| WebSocket::open(doors, 8082, "/echo")),
        ],
        ..NONE
    },
    Service {
        name: "nginx",
        unit: "nginx.service",
        package: "nginx",
        group: 1,
        with: &["Node.js"],
        setup: concat!(
            "sed -i 's/worker_connections .*/worker_connections 4096;/' /etc/nginx/nginx.conf; ",
            "printf 'keepalive_timeout 600s;\\nkeepalive_requests 1000000;\\nsend_timeout 600s;\\n\
             proxy_read_timeout 600s;\\n' >/etc/nginx/conf.d/patient.conf; \
             printf 'location /echo {\\n proxy_pass http://127.0.0.1:8082;\\n proxy_http_version 1.1;\\n \
             proxy_set_header Upgrade $http_upgrade;\\n proxy_set_header Connection upgrade;\\n}\\n\
             location ~ [.]php$ {\\n include snippets/fastcgi-php.conf;\\n \
             fastcgi_pass unix:/run/php/php8.4-fpm.sock;\\n}\\n' >/etc/nginx/snippets/held.conf; \
             sed -i 's/server_name _;/server_name _; include snippets\\/held.conf;/' \
             /etc/nginx/sites-available/default; ",
            "d=/var/www/html; mkdir -p $d; for i in $(seq -w 0 255); do \
             echo \"line-$i-of-a-page\"; done >$d/held; \
             awk 'BEGIN { for (i = 0; i < 1000000; i++) printf \"%015d\\n\", i }' >$d/numbers"
        ),
        ports: &[80],
        clients: &[
            page!(80),
            ("a slow download in flight", |doors| {
                Download::open(doors, 80)
            }),
            ("a proxied websocket", |doors| {
                WebSocket::open(doors, 80, "/echo")
            }),
            (
                "1,000 kept-alive connections (worker_connections 4096)",
                |doors| Crowd::open(doors, 80),
            ),
        ],
        ..NONE
    },
    Service {
        name: "PHP-FPM",
        unit: "php8.4-fpm.service",
        package: "php8.4-fpm",
        group: 3,
        with: &["nginx"],
        setup: "mkdir -p /var/www/html; \
                echo '<?php echo strrev(\"turn \" . $_GET[\"n\"]);' >/var/www/html/held.php",
        ports: &[80],
        clients: &[("a kept-alive connection through nginx", |doors| {
            KeptAlive::open(doors, 80, |number| {
                let body: String = format!("turn {number}").chars().rev().collect();
                (format!("/held.php?n={number}"), body.into_bytes())
            })
        })],
        ..NONE
    },
    Service {
        name: "Gunicorn",
        unit: "held-gunicorn.service",
        package: "gunicorn",
        group: 1,
        setup: GUNICORN,
        ports: &[8083],
        clients: &[("a kept-alive connection", |doors| {
            KeptAlive::open(doors, 8083, |number| {
                (
                    format!("/{number}"),
                    format!("{} turns", number + 1).into_bytes(),
                )
            })
        })],
        ..NONE
    },
    Service {
        name: "Unbound",
        unit: "unbound.service",
        package: "unbound",
        group: 1,
        setup: "rm -f /etc/unbound/unbound.conf.d/root-auto-trust-anchor-file.conf; printf 'server:\\n interface: 0.0.0.0\\n access-control: 10.0.2.0/24 allow\\n \
                tcp-idle-timeout: 600000\\n local-data: \"held.example. A 127.1.2.3\"\\n' \
                >/etc/unbound/unbound.conf.d/held.conf",
        ports: &[53],
        clients: &[("DNS over one TCP connection", Dns::open)],
        ..NONE
    },
    Service {
        name: "Dovecot",
        unit: "dovecot.service",
        package: "dovecot-core",
        group: 2,
        setup: "printf 'auth_allow_cleartext = yes\\nssl = no\\n' >/etc/dovecot/conf.d/99-held.conf",
        ports: &[143],
        clients: &[("IMAP IDLE", Idle::open)],
        ..NONE
    },
    Service {
        name: "OpenSSH",
        unit: "ssh.service",
        package: "openssh-server",
        group: 2,
        with: &["memcached"],
        setup: "install -d -m 700 -o held -g held /home/held/.ssh; \
                install -m 600 -o held -g held /root/held.pub /home/held/.ssh/authorized_keys",
        ports: &[22, 11211],
        clients: &[
            ("a shell on a terminal (ssh)", Shell::open as Open),
            ("a port forward (ssh)", Forward::open),
        ],
        ..NONE
    },
    Service {
        name: "Prometheus",
        unit: "prometheus.service",
        package: "prometheus",
        group: 2,
        ports: &[9090],
        clients: &[("a kept-alive connection", |doors| {
            KeptAlive::open(doors, 9090, |number| {
                let body = format!(
                    "{{\"status\":\"success\",\"data\":{{\"resultType\":\"vector\",\"result\":[{{\
                     \"metric\":{{}},\"value\":[7,\"{number}\"]}}]}}}}"
                );
                let path = format!("/api/v1/query?query=vector({number})&time=7");
                (path, body.into_bytes())
            })
        })],
        ..NONE
    },
    Service {
        name: "Tomcat",
        unit: "tomcat10.service",
        package: "tomcat10",
        group: 2,
        setup: "sed -i 's/connectionTimeout=\"20000\"/connectionTimeout=\"600000\" \
                maxKeepAliveRequests=\"-1\"/' /etc/tomcat10/server.xml; \
                d=/var/lib/tomcat10/webapps/ROOT; mkdir -p $d; for i in $(seq -w 0 255); do \
                echo \"line-$i-of-a-page\"; done >$d/held",
        ports: &[8080],
        clients: &[page!(8080)],
        ..NONE
    },
    Service {
        name: "RabbitMQ",
        unit: "rabbitmq-server.service",
        package: "rabbitmq-server",
        group: 2,
        setup: "echo 'loopback_users = none' >>/etc/rabbitmq/rabbitmq.conf; \
                rabbitmq-plugins enable --offline rabbitmq_stomp",
        ports: &[61613],
        clients: &[("STOMP, a message not acknowledged yet", |doors| {
            Stomp::open(doors, 61613)
        })],
        ..NONE
    },
    Service {
        name: "Podman container",
        unit: "held-container.service",
        package: "podman",
        group: 3,
        setup: CONTAINER,
        ports: &[8084],
        clients: &[("values set and read, a counter", |doors| {
            Memcached::open(doors, 8084)
        })],
        ..NONE
    },
];

/// A server of pages and websockets in a few lines.
const NODE: &str = r#"cat >/usr/local/lib/held.js <<'END'
const http = require('http');
let page = '';
for (let i = 0; i < 256; i++) page += `line-${String(i).padStart(3, '0')}-of-a-page\n`;
const server = http.createServer((request, answer) => answer.end(page));
server.keepAliveTimeout = 600000;
server.on('upgrade', (request, socket) => {
  socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
    'Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n');
  let have = Buffer.alloc(0);
  socket.on('data', (data) => {
    have = Buffer.concat([have, data]);
    while (have.length >= 6 && have.length >= 6 + (have[1] & 127)) {
      const length = have[1] & 127, mask = have.subarray(2, 6);
      const text = have.subarray(6, 6 + length).map((byte, i) => byte ^ mask[i % 4]);
      socket.write(Buffer.concat([Buffer.from([0x81, length]), text]));
      have = have.subarray(6 + length);
    }
  });
});
server.listen(8082, '0.0.0.0');
END
printf '[Service]\nExecStart=/usr/bin/node /usr/local/lib/held.js\nDynamicUser=yes\n' \
  >/etc/systemd/system/held-node.service
systemctl daemon-reload"#;

const GUNICORN: &str = r"cat >/usr/local/lib/held.py <<'END'
turns = 0
def app(environ, start_response):
    global turns
    turns = turns + 1 if environ['PATH_INFO'] != '/0' else 1
    body = f'{turns} turns'.encode()
    start_response('200 OK', [('Content-Length', str(len(body)))])
    return [body]
END
printf '[Service]\nType=notify\nUser=www-data\nWorkingDirectory=/usr/local/lib\nExecStart=/usr/bin/gunicorn -b 0.0.0.0:8083 -k gthread --threads 4 --keep-alive 600 held:app\n' \
  >/etc/systemd/system/held-gunicorn.service
systemctl daemon-reload";

const CONTAINER: &str = r#"r=/var/lib/held; mkdir -p $r/usr/bin $r/proc $r/sys $r/dev $r/tmp $r/etc $r/run
for f in /usr/bin/memcached $(ldd /usr/bin/memcached | grep -o '/[^ ]*'); do
  mkdir -p $r$(dirname $f); cp -L $f $r$f; done
echo 'root:x:0:0:root:/:/bin/sh' >$r/etc/passwd
printf '[Service]\nType=notify\nNotifyAccess=all\nDelegate=yes\nKillMode=mixed\nExecStart=/usr/bin/podman run --name held --rm --replace --network=host --cgroups=split --sdnotify=conmon -d --rootfs /var/lib/held /usr/bin/memcached -u root -l 0.0.0.0 -p 8084\n' \
  >/etc/systemd/system/held-container.service
systemctl daemon-reload"#;
