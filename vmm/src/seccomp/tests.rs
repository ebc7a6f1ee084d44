use proptest::prelude::*;

use super::compiler::{Call, Mismatch, Source, compile, parse};
use super::image::{Reader, THREADS as NAMES};
use super::*;

const SOURCE: &str = include_str!("../../../resources/seccomp/x86_64.json");
const X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const ENOSYS: u32 = 0x0005_0000 | 38;

/// What the kernel's interpreter would return. Panics on what the kernel would refuse to load.
fn run(program: &[libc::sock_filter], arch: u32, call: &Call) -> u32 {
    let mut data = Vec::new();
    data.extend(call.number.to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend([0; 8]);
    call.args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let instruction = program[at];
        at += 1;
        let k = instruction.k;
        match instruction.code {
            0x20 => {
                let place = usize::try_from(k).unwrap();
                assert_eq!(place % 4, 0);
                accumulator = u32::from_le_bytes(data[place..place + 4].try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 if accumulator == k => at += usize::from(instruction.jt),
            0x15 => at += usize::from(instruction.jf),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn call(number: libc::c_long, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call {
        number: u32::try_from(number).unwrap(),
        args: all,
        pid: std::process::id(),
    }
}

/// The program of a thread with all groups.
fn program(image: &[u8], thread: Thread) -> Option<Vec<libc::sock_filter>> {
    Filters::built_in().program(image, thread)
}

/// The program of an io thread that has only these devices.
fn io_program(possible: impl Fn(DeviceKind) -> bool, changes: bool) -> Vec<libc::sock_filter> {
    let filters = Filters::built_in().for_devices(possible, changes);
    let filters = filters.for_backends(false);
    filters.program(BUILT_IN, Thread::Io).unwrap()
}

/// What the built-in filter of a thread says.
fn verdict(thread: Thread, number: libc::c_long, args: &[u64]) -> u32 {
    run(&program(BUILT_IN, thread).unwrap(), X86_64, &call(number, args))
}

#[track_caller]
fn assert_verdicts(thread: Thread, calls: &[(libc::c_long, &[u64])], expected: u32) {
    for (number, args) in calls {
        assert_eq!(
            verdict(thread, *number, args),
            expected,
            "{thread:?}: {number} {args:x?}"
        );
    }
}

fn pid() -> u64 {
    std::process::id().into()
}

#[test]
fn no_thread_starts_programs_or_processes_or_reaches_others() {
    for thread in THREADS {
        assert_verdicts(
            thread,
            &[
                (libc::SYS_execve, &[]),
                (libc::SYS_execveat, &[]),
                (libc::SYS_fork, &[]),
                (libc::SYS_vfork, &[]),
                // SIGCHLD, as fork has it, and a new user namespace.
                (libc::SYS_clone, &[17]),
                (libc::SYS_clone, &[0x3d_0f00 | 0x1000_0000]),
                (libc::SYS_unshare, &[]),
                (libc::SYS_setns, &[]),
                (libc::SYS_ptrace, &[]),
                (libc::SYS_process_vm_readv, &[]),
                (libc::SYS_pidfd_open, &[]),
                (libc::SYS_kill, &[1, 9]),
                (libc::SYS_kill, &[pid(), 9]),
                (libc::SYS_tgkill, &[pid() + 1, 1, 9]),
                (libc::SYS_tkill, &[1, 9]),
                (libc::SYS_mount, &[]),
                (libc::SYS_pivot_root, &[]),
                (libc::SYS_chroot, &[]),
                (libc::SYS_mknod, &[]),
                (libc::SYS_bpf, &[]),
                (libc::SYS_keyctl, &[]),
                (libc::SYS_add_key, &[]),
                (libc::SYS_perf_event_open, &[]),
                (libc::SYS_init_module, &[]),
                (libc::SYS_setuid, &[]),
                (libc::SYS_userfaultfd, &[]),
            ],
            TRAP,
        );
    }
}

#[test]
fn every_thread_may_wait_for_another() {
    let (futex, sched_yield) = (libc::SYS_futex, libc::SYS_sched_yield);
    for thread in THREADS {
        assert_verdicts(thread, &[(futex, &[0, 128]), (sched_yield, &[])], ALLOW);
    }
}

#[test]
fn no_thread_makes_code() {
    let (private, fixed) = (0x22, 0x32);
    for thread in THREADS {
        assert_verdicts(
            thread,
            &[
                (libc::SYS_mmap, &[0, 4096, 7, private, u64::MAX, 0]),
                (libc::SYS_mmap, &[0, 4096, 5, private, u64::MAX, 0]),
                (libc::SYS_mprotect, &[0, 4096, 5]),
                (libc::SYS_mprotect, &[0, 4096, 0xf_0000_0004]),
                (libc::SYS_pkey_mprotect, &[0, 4096, 4]),
                (libc::SYS_memfd_create, &[]),
                (libc::SYS_memfd_create, &[0, 2]),
            ],
            TRAP,
        );
    }
    // Memory of the allocator is all that threads that serve the guest map.
    assert_verdicts(Thread::Vcpu, &[(libc::SYS_mmap, &[0, 4096, 3, private])], ALLOW);
    assert_verdicts(Thread::Vcpu, &[(libc::SYS_mmap, &[0, 4096, 3, fixed])], TRAP);
}

#[test]
fn only_the_control_thread_makes_memory_that_backends_share() {
    let calls: [(libc::c_long, &[u64]); 2] = [
        (libc::SYS_memfd_create, &[0, 1]),
        (libc::SYS_memfd_create, &[0, 0x5400_0005]),
    ];
    for thread in THREADS {
        let expected = if thread == Thread::Control { ALLOW } else { TRAP };
        assert_verdicts(thread, &calls, expected);
    }
}

#[test]
fn an_io_thread_talks_to_backends_only_where_there_can_be_some() {
    let program = |possible| {
        let filters = Filters::built_in().for_devices(|kind| kind == DeviceKind::Block, true);
        filters
            .for_backends(possible)
            .program(BUILT_IN, Thread::Io)
            .unwrap()
    };
    let set_timeout = call(libc::SYS_setsockopt, &[3, 1, 20]);
    assert_eq!(run(&program(true), X86_64, &set_timeout), ALLOW);
    assert_eq!(run(&program(false), X86_64, &set_timeout), TRAP);
    assert_eq!(verdict(Thread::Vcpu, libc::SYS_setsockopt, &[3, 1, 20]), TRAP);
}

#[test]
fn only_the_control_thread_opens_files_and_starts_threads() {
    let calls: [(libc::c_long, &[u64]); 3] = [
        (libc::SYS_openat, &[]),
        (libc::SYS_unlink, &[]),
        (libc::SYS_clone, &[0x3d_0f00]),
    ];
    assert_verdicts(Thread::Control, &calls, ALLOW);
    assert_eq!(verdict(Thread::Control, libc::SYS_clone3, &[]), ENOSYS);
    for thread in [Thread::Api, Thread::Vcpu, Thread::Flush] {
        assert_verdicts(thread, &calls, TRAP);
        assert_verdicts(thread, &[(libc::SYS_clone3, &[])], TRAP);
    }
    let io = io_program(|_| true, false);
    for (number, args) in calls {
        assert_eq!(run(&io, X86_64, &call(number, args)), TRAP, "{number}");
    }
}

#[test]
fn each_thread_controls_only_its_own_devices() {
    let (run_vcpu, create_vm, set_tap, no_wait, type_in) = (0xae80, 0xae01, 0x4004_54ca, 0x5421, 0x5412);
    let allowed = |thread, command| verdict(thread, libc::SYS_ioctl, &[9, command]) == ALLOW;
    for thread in THREADS {
        assert!(!allowed(thread, type_in), "{thread:?}");
    }
    assert!(allowed(Thread::Vcpu, run_vcpu) && !allowed(Thread::Io, run_vcpu));
    assert!(allowed(Thread::Control, create_vm) && !allowed(Thread::Vcpu, create_vm));
    assert!(allowed(Thread::Control, set_tap) && !allowed(Thread::Vcpu, set_tap));
    assert!(allowed(Thread::Api, no_wait) && !allowed(Thread::Vcpu, no_wait));
    // The kernel looks at 32 bits of the command, and so does the filter.
    assert!(allowed(Thread::Vcpu, 0x1_0000_ae80));
}

#[test]
fn sockets_are_those_of_unix() {
    let (unix, inet, packet, stream, cloexec) = (1, 2, 17, 1, 0x80000);
    for thread in THREADS {
        assert_verdicts(
            thread,
            &[
                (libc::SYS_socket, &[inet, stream]),
                (libc::SYS_socket, &[packet, 3]),
                (libc::SYS_socket, &[unix, 3]),
            ],
            TRAP,
        );
    }
    let own: [(libc::c_long, &[u64]); 1] = [(libc::SYS_socket, &[unix, stream | cloexec])];
    assert_verdicts(Thread::Io, &own, ALLOW);
    assert_verdicts(Thread::Api, &own, TRAP);
}

#[test]
fn signals_go_to_the_process_itself() {
    for thread in THREADS {
        assert_verdicts(thread, &[(libc::SYS_tgkill, &[pid(), 1, 6])], ALLOW);
        // The kernel takes a process number of 32 bits.
        assert_verdicts(thread, &[(libc::SYS_tgkill, &[pid() | 1 << 32, 1, 6])], ALLOW);
    }
}

#[test]
fn other_ways_to_call_the_kernel_are_closed() {
    let program = program(BUILT_IN, Thread::Io).unwrap();
    let exit = call(libc::SYS_exit_group, &[]);
    assert_eq!(run(&program, X86_64, &exit), ALLOW);
    // AUDIT_ARCH_I386: int 0x80.
    assert_eq!(run(&program, 0x4000_0003, &exit), TRAP);
    // The x32 numbers.
    let x32 = call(libc::SYS_exit_group | 0x4000_0000, &[]);
    assert_eq!(run(&program, X86_64, &x32), TRAP);
}

#[test]
fn an_io_thread_does_without_devices_that_cannot_come() {
    let narrow = io_program(|kind| kind == DeviceKind::Block, false);
    let wide = program(BUILT_IN, Thread::Io).unwrap();
    let socket = call(libc::SYS_socket, &[1, 1]);
    assert_eq!(
        (run(&wide, X86_64, &socket), run(&narrow, X86_64, &socket)),
        (ALLOW, TRAP)
    );
    let read = call(libc::SYS_preadv, &[]);
    assert_eq!(run(&narrow, X86_64, &read), ALLOW);
    // A change of a disk opens another file.
    let (open, attach_tap) = (
        call(libc::SYS_openat, &[]),
        call(libc::SYS_ioctl, &[3, 0x4004_54ca]),
    );
    let changing = io_program(|kind| kind == DeviceKind::Block, true);
    assert_eq!(
        (run(&narrow, X86_64, &open), run(&changing, X86_64, &open)),
        (TRAP, ALLOW)
    );
    assert_eq!(
        (
            run(&changing, X86_64, &attach_tap),
            run(&wide, X86_64, &attach_tap)
        ),
        (TRAP, ALLOW)
    );
    assert!(narrow.len() < wide.len());
}

#[test]
fn a_control_thread_that_has_settled_makes_nothing_new() {
    let settled = |devices: &[DeviceKind]| {
        let filters = Filters::built_in().for_devices(|kind| devices.contains(&kind), false);
        let filters = filters.for_backends(false);
        filters.program(BUILT_IN, Thread::Settled).unwrap()
    };
    let (without, with) = (settled(&[DeviceKind::Block]), settled(&[DeviceKind::Vsock]));
    let verdicts = |number: libc::c_long, args: &[u64]| {
        let call = call(number, args);
        let before = verdict(Thread::Control, number, args);
        (before, run(&without, X86_64, &call), run(&with, X86_64, &call))
    };
    let gone = (ALLOW, TRAP, TRAP);
    assert_eq!(verdicts(libc::SYS_io_uring_setup, &[]), gone);
    assert_eq!(verdicts(libc::SYS_clone, &[0x3d_0f00]), gone);
    assert_eq!(verdicts(libc::SYS_ioctl, &[9, 0xae01]), gone);
    // Only the vsock device calls others.
    let of_device = (ALLOW, TRAP, ALLOW);
    assert_eq!(verdicts(libc::SYS_socket, &[1, 1]), of_device);
    assert_eq!(verdicts(libc::SYS_connect, &[]), of_device);
    let kept = (ALLOW, ALLOW, ALLOW);
    assert_eq!(verdicts(libc::SYS_unlink, &[]), kept);
    assert_eq!(verdicts(libc::SYS_fcntl, &[3, 37]), kept);
}

#[test]
fn the_control_thread_has_the_rules_of_all_threads_that_it_starts() {
    let source = parse(SOURCE.as_bytes()).unwrap();
    for thread in ["io", "vcpu", "flush"] {
        let missing = source.threads[thread]
            .iter()
            .find(|group| !source.threads["control"].contains(group));
        assert_eq!(missing, None, "{thread}");
    }
}

#[test]
fn no_rule_stands_twice_and_every_group_is_used() {
    let source = parse(SOURCE.as_bytes()).unwrap();
    for (name, rules) in &source.groups {
        let used = source.threads.values().any(|groups| groups.contains(name));
        assert!(used, "{name}");
        for (at, rule) in rules.iter().enumerate() {
            let same = |other: &compiler::Rule| allowed(other) == allowed(rule);
            assert!(!rules[..at].iter().any(same), "{name}: rule {at}");
        }
    }
}

/// What a rule is about, for comparison.
fn allowed(rule: &compiler::Rule) -> String {
    format!("{:?}", (rule.syscall, &rule.args))
}

#[test]
fn the_control_threads_own_rules_repeat_none_of_its_other_groups() {
    let source = parse(SOURCE.as_bytes()).unwrap();
    let others = source.threads["control"]
        .iter()
        .filter(|group| *group != "control");
    let rules = others.flat_map(|group| &source.groups[group]);
    let known: Vec<_> = rules.map(allowed).collect();
    let own = source.groups["control"].iter().map(allowed);
    let again: Vec<_> = own.filter(|rule| known.contains(rule)).collect();
    assert_eq!(again, Vec::<String>::new());
}

#[test]
fn the_kernel_would_load_every_program() {
    for thread in THREADS {
        let program = program(BUILT_IN, thread).unwrap();
        assert!(program.len() <= 4096, "{thread:?}: {}", program.len());
        for (at, instruction) in program.iter().enumerate() {
            let left = program.len() - at - 1;
            let jump = match instruction.code {
                0x05 => usize::try_from(instruction.k).unwrap(),
                _ => usize::from(instruction.jt.max(instruction.jf)),
            };
            assert!(
                jump < left || (jump, instruction.code) == (0, 0x06),
                "{thread:?}: {at}"
            );
        }
    }
}

#[test]
fn damaged_bytes_are_no_filter() {
    assert!(THREADS.iter().all(|thread| program(BUILT_IN, *thread).is_some()));
    for length in 0..BUILT_IN.len() {
        let part = &BUILT_IN[..length];
        assert!(
            THREADS.iter().any(|thread| program(part, *thread).is_none()),
            "{length}"
        );
    }
    let mut other_version = BUILT_IN.to_vec();
    other_version[7] += 1;
    assert!(Reader::new(&other_version).is_none());
}

/// A text with one group for all threads.
fn text(rules: &str) -> String {
    let threads: Vec<_> = NAMES.iter().map(|name| format!("\"{name}\": [\"g\"]")).collect();
    format!(
        "{{\"threads\": {{{}}}, \"groups\": {{\"g\": [{rules}]}}}}",
        threads.join(",")
    )
}

#[track_caller]
fn assert_refused(text: &str, words: &[&str]) {
    let error = crate::error::chain(&compile(text.as_bytes()).unwrap_err());
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn says_what_is_wrong_with_a_text() {
    assert_refused("{", &["no JSON", "line 1"]);
    assert_refused(&text(r#"{"syscall": "reed"}"#), &["no system call 'reed'"]);
    assert_refused(
        &text(r#"{"syscall": "read", "arg": []}"#),
        &["unknown field `arg`"],
    );
    let rule = |condition| text(&format!(r#"{{"syscall": "read", "args": [{condition}]}}"#));
    assert_refused(&rule(r#"{"index": 6, "val": 1}"#), &["'g'", "argument 6"]);
    assert_refused(&rule(r#"{"index": 1, "val": "ten"}"#), &["ten", "0xae80"]);
    assert_refused(&rule(r#"{"index": 1}"#), &["val"]);
    assert_refused(
        &rule(r#"{"index": 0, "op": {"masked_eq": 1}, "val": "pid"}"#),
        &["\"pid\"", "\"eq\""],
    );
    assert_refused(
        &text(r#"{"syscall": "read"}, {"syscall": "read", "args": [{"index": 0, "val": 1}]}"#),
        &["'g'", "rule 1", "cannot be reached"],
    );
    assert_refused(
        &text("").replace("[\"g\"]", "[\"h\"]"),
        &["group 'h'", "not there"],
    );
    assert_refused(&text("").replace("vcpu", "cpu"), &["no thread 'cpu'"]);
    assert_refused(
        &text("").replace("\"vcpu\": [\"g\"],", ""),
        &["no filter", "'vcpu'"],
    );
}

#[test]
fn takes_the_other_results_of_a_mismatch() {
    for (name, result) in [
        ("log", 0x7ffc_0000),
        ("kill_process", 0x8000_0000),
        ("trap", TRAP),
    ] {
        let text = text("").replacen('{', &format!("{{\"mismatch_action\": \"{name}\","), 1);
        let image = compile(text.as_bytes()).unwrap();
        let program = program(&image, Thread::Io).unwrap();
        assert_eq!(
            run(&program, X86_64, &call(libc::SYS_read, &[])),
            result,
            "{name}"
        );
    }
}

#[test]
fn knows_the_names_of_system_calls() {
    for (name, number) in [
        ("read", libc::SYS_read),
        ("execve", libc::SYS_execve),
        ("rseq", libc::SYS_rseq),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
        ("io_uring_enter", libc::SYS_io_uring_enter),
        ("landlock_restrict_self", libc::SYS_landlock_restrict_self),
        ("mseal", libc::SYS_mseal),
    ] {
        let number = u32::try_from(number).unwrap();
        assert_eq!(compiler::name(number), Some(name));
        let image = compile(text(&format!(r#"{{"syscall": "{name}"}}"#)).as_bytes()).unwrap();
        let program = program(&image, Thread::Io).unwrap();
        assert_eq!(run(&program, X86_64, &call(number.into(), &[])), ALLOW, "{name}");
    }
    assert_eq!((compiler::name(335), compiler::name(5000)), (None, None));
}

/// What the rules of a text say of a call, without any code.
fn judged(source: &Source, call: &Call) -> u32 {
    let rule = source.rules("io").find(|(_, rule)| rule.matches(call));
    match (rule, source.mismatch_action) {
        (Some((_, rule)), _) => rule.errno.map_or(ALLOW, |errno| 0x0005_0000 | u32::from(errno)),
        (None, Mismatch::Trap) => TRAP,
        (None, other) => panic!("{other:?}"),
    }
}

/// Values that differ in few bits, so that conditions hold often.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4u64,
        Just(1 << 32),
        Just(1 << 32 | 1),
        Just(u64::MAX),
        Just(pid())
    ]
}

fn condition() -> impl Strategy<Value = String> {
    let width = prop_oneof![Just("dword"), Just("qword")];
    let op = prop_oneof![
        Just("\"eq\"".to_owned()),
        value().prop_map(|mask| format!("{{\"masked_eq\": {mask}}}"))
    ];
    let number = (op, value()).prop_map(|(op, val)| (op, format!("\"{val:#x}\"")));
    let pid = Just(("\"eq\"".to_owned(), "\"pid\"".to_owned()));
    let comparison = prop_oneof![4 => number, 1 => pid];
    (0..2u8, width, comparison).prop_map(|(index, width, (op, val))| {
        format!("{{\"index\": {index}, \"type\": \"{width}\", \"op\": {op}, \"val\": {val}}}")
    })
}

fn rule() -> impl Strategy<Value = String> {
    let name = prop_oneof![Just("read"), Just("write"), Just("ioctl")];
    let errno = prop_oneof![Just(String::new()), Just(", \"errno\": 5".to_owned())];
    // Conditions on every rule, so that none makes a later one unreachable.
    (name, prop::collection::vec(condition(), 1..4), errno).prop_map(|(name, conditions, errno)| {
        format!(
            "{{\"syscall\": \"{name}\", \"args\": [{}]{errno}}}",
            conditions.join(",")
        )
    })
}

proptest! {
    #[test]
    fn code_says_what_the_rules_say(
        // More than what one conditional jump can skip.
        rules in prop::collection::vec(rule(), 0..80),
        calls in prop::collection::vec((prop_oneof![Just(0), Just(1), Just(16), Just(2)], value(), value()), 1..40),
    ) {
        let text = text(&rules.join(","));
        let source = parse(text.as_bytes()).unwrap();
        let image = compile(text.as_bytes()).unwrap();
        let program = program(&image, Thread::Io).unwrap();
        for (number, first, second) in calls {
            let call = call(number, &[first, second]);
            prop_assert_eq!(run(&program, X86_64, &call), judged(&source, &call), "{:?} {}", call, text);
        }
    }
}
