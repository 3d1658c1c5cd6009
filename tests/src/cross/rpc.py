# A client of the RPC with CRIU's own messages: rpc.py dump|restore PID DIR
import os
import socket
import subprocess
import sys

from pycriu import rpc_pb2 as rpc

what, pid, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
stages = []


def connect():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = str(theirs.fileno())
    program = ["/run/rcr/criu", "swrk", number]
    subprocess.Popen(program, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    # Only so that nobody waits for ever for an answer that never comes.
    ours.settimeout(300)
    return ours


def ask(connection, request):
    connection.send(request.SerializeToString())
    while True:
        answer = rpc.criu_resp()
        answer.ParseFromString(connection.recv(1 << 16))
        if answer.type != rpc.NOTIFY:
            return answer
        stages.append(answer.notify.script)
        word = rpc.criu_req(type=rpc.NOTIFY, notify_success=True)
        connection.send(word.SerializeToString())


def request(kind):
    r = rpc.criu_req(type=kind)
    r.opts.images_dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    r.opts.log_file = what + ".log"
    r.opts.log_level = 4
    r.opts.notify_scripts = True
    return r


if what == "dump":
    answer = ask(connect(), rpc.criu_req(type=rpc.VERSION))
    assert answer.success and answer.version.major_number >= 4, answer
    features = rpc.criu_req(type=rpc.FEATURE_CHECK)
    features.features.mem_track = True
    answer = ask(connect(), features)
    assert answer.success and answer.features.HasField("mem_track"), answer
    # What is not done is refused by name, over a connection that stays open.
    connection = connect()
    refused = request(rpc.DUMP)
    refused.opts.pid = pid
    refused.opts.lazy_pages = True
    refused.opts.leave_running = True
    answer = ask(connection, refused)
    assert not answer.success and "lazy-pages" in answer.cr_errmsg, answer
    assert stages == [], stages
    dump = request(rpc.DUMP)
    dump.opts.pid = pid
    answer = ask(connect(), dump)
    assert answer.success, answer
    assert stages == ["pre-dump", "post-dump"], stages
else:
    answer = ask(connect(), request(rpc.RESTORE))
    assert answer.success and answer.restore.pid == pid, answer
    wanted = [
        "pre-restore",
        "setup-namespaces",
        "post-setup-namespaces",
        "post-restore",
        "pre-resume",
        "post-resume",
    ]
    assert stages == wanted, stages
