//! Metrics, in both forms: lines of JSON and Prometheus text. A guest of a few instructions is enough.

use std::collections::BTreeMap;
use std::time::Instant;

use mayfly_tests::{Drive, HOST_TIMEOUT, Monitor, MonitorBuilder, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Map, Value, json};

/// The groups of a line and their names, as tools for Firecracker's lines expect them; no more and no fewer.
const SCHEMA: &[(&str, &str)] = &[
    (
        "api_server",
        "process_startup_time_us process_startup_time_cpu_us",
    ),
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails \
         free_page_report_count free_page_report_freed free_page_report_fails free_page_hint_count \
         free_page_hint_freed free_page_hint_fails",
    ),
    (
        "block",
        "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count \
         queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count \
         write_count rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count read_agg write_agg",
    ),
    ("deprecated_api", "deprecated_http_api_calls"),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    ),
    (
        "get_api_requests",
        "instance_info_count machine_cfg_count mmds_count vmm_version_count hotplug_memory_count",
    ),
    (
        "i8042",
        "error_count missed_read_count missed_write_count read_count reset_count write_count",
    ),
    ("interrupts", "triggers config_updates"),
    (
        "latencies_us",
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm vmm_full_create_snapshot \
         vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    (
        "logger",
        "missed_metrics_count metrics_fails missed_log_count rate_limited_log_count",
    ),
    (
        "memory_hotplug",
        "activate_fails queue_event_fails queue_event_count plug_count plug_bytes plug_fails plug_agg unplug_count \
         unplug_bytes unplug_fails unplug_discard_fails unplug_agg state_count state_fails state_agg unplug_all_count \
         unplug_all_fails unplug_all_agg",
    ),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token rx_count tx_bytes \
         tx_count tx_errors tx_frames connections_created connections_destroyed",
    ),
    (
        "net",
        "activate_fails cfg_fails no_rx_avail_buffer no_tx_avail_buffer event_fails rx_queue_event_count \
         rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count rx_packets_count \
         rx_fails rx_count tap_read_fails tap_write_fails tx_bytes_count tx_malformed_frames tx_fails tx_count \
         tx_packets_count tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled \
         tx_spoofed_mac_count tx_remaining_reqs_count tap_write_agg",
    ),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails mmds_count \
         mmds_fails hotplug_memory_count hotplug_memory_fails pmem_count pmem_fails",
    ),
    (
        "pmem",
        "activate_fails cfg_fails event_fails queue_event_count rate_limiter_throttled_events \
         rate_limiter_event_count",
    ),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails logger_count \
         logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails metrics_count metrics_fails \
         network_count network_fails mmds_count mmds_fails vsock_count vsock_fails pmem_count pmem_fails \
         serial_count serial_fails hotplug_memory_count hotplug_memory_fails",
    ),
    ("seccomp", "num_faults"),
    ("signals", "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill"),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count \
         rate_limiter_dropped_bytes",
    ),
    (
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails exit_io_in_agg \
         exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg",
    ),
    ("vmm", "panic_count"),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails muxer_event_fails \
         conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count \
         tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails \
         rx_read_fails",
    ),
];

/// A machine with this kernel and metrics; the second part is the folder of the kernel.
fn machine(name: &str, kernel: &TinyKernel) -> Result<(TestVm, Scratch)> {
    let scratch = Scratch::new("kernel")?;
    Ok((TestVm::new(name).kernel(kernel.write(&scratch)?), scratch))
}

/// Starts a machine and waits until its guest has said that it is up.
fn up(vm: TestVm) -> Result<Vm> {
    let vm = vm.start()?;
    if vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT) {
        return Ok(vm);
    }
    Err(vm.failure("the guest did not come up"))
}

/// Asserts that a line has every group with exactly its names, and numbers for all of them.
#[track_caller]
fn assert_schema(line: &Value) {
    for (group, names) in SCHEMA {
        let empty = Map::new();
        let mut expected: Vec<_> = names.split_whitespace().collect();
        expected.sort_unstable();
        let actual = line[group].as_object().unwrap_or(&empty);
        assert_eq!(actual.keys().collect::<Vec<_>>(), expected, "{group}");
        for (name, value) in actual {
            let is_agg = value["min_us"].is_u64() && value["max_us"].is_u64() && value["sum_us"].is_u64();
            assert_eq!(is_agg, name.ends_with("_agg"), "{group}.{name}");
            assert!(is_agg || value.is_u64(), "{group}.{name} is {value}");
        }
    }
    assert!(
        line["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000),
        "{line}"
    );
}

#[test]
fn a_line_before_the_start_has_every_name_of_the_schema() -> Result {
    let monitor = MonitorBuilder::new("schema")?.metrics().start()?;
    monitor.signal(libc::SIGTERM)?;
    monitor.wait_exit()?;
    let lines = monitor.metrics()?;
    assert_eq!(lines.len(), 1);
    assert_schema(&lines[0]);
    assert_eq!(lines[0]["vcpu"]["exit_io_out"], 0);
    Ok(())
}

#[test]
fn a_line_of_a_machine_has_the_same_names_and_one_group_per_drive() -> Result {
    let (vm, scratch) = machine("schema", &TinyKernel::new().print("up\n").halt())?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = up(vm.vcpus(2).entropy().drive(Drive::new("data", &image)))?;
    vm.action("FlushMetrics")?;
    let lines = vm.metrics()?;
    assert_schema(&lines[0]);
    assert_eq!(lines[0]["block_data"], lines[0]["block"]);
    assert!(lines[0].get("entropy_entropy").is_none());
    let vcpu = &lines[0]["vcpu"];
    assert!(vcpu["exit_io_out"].as_u64() >= Some(3), "{vcpu}");
    let out = &vcpu["exit_io_out_agg"];
    assert!(out["max_us"].as_u64() >= out["min_us"].as_u64(), "{vcpu}");
    assert!(out["sum_us"].as_u64() >= out["max_us"].as_u64(), "{vcpu}");
    assert!(out["sum_us"].as_u64() > Some(0), "{vcpu}");
    Ok(())
}

#[test]
fn durations_stay_and_counts_start_again_with_each_line() -> Result {
    let (vm, _scratch) = machine("absolute", &TinyKernel::new().print("up\n").halt())?;
    let vm = up(vm)?;
    vm.pause()?;
    vm.resume()?;
    vm.patch("/drives/none", &json!({"drive_id": "none"}))?;
    vm.action("FlushMetrics")?;
    vm.action("FlushMetrics")?;
    let lines = vm.metrics()?;
    let (first, second) = (&lines[0], &lines[1]);
    assert_eq!(first["latencies_us"], second["latencies_us"]);
    assert!(first["latencies_us"]["pause_vm"].as_u64() > Some(0), "{first}");
    assert_eq!(first["patch_api_requests"]["drive_fails"], 1);
    assert_eq!(second["patch_api_requests"]["drive_count"], 0);
    assert_eq!(second["put_api_requests"]["actions_count"], 1);
    assert_eq!(
        first["vcpu"]["exit_io_out_agg"]["max_us"],
        second["vcpu"]["exit_io_out_agg"]["max_us"]
    );
    assert_eq!(second["vcpu"]["exit_io_out_agg"]["sum_us"], 0);
    Ok(())
}

#[test]
fn refusals_by_either_thread_and_deprecated_fields_are_counted() -> Result {
    let monitor = MonitorBuilder::new("fails")?.metrics().start()?;
    monitor.request("PUT", "/machine-config", "{")?;
    monitor.put("/machine-config", &json!({"vcpu_count": 99, "mem_size_mib": 128}))?;
    monitor.put(
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "None"}),
    )?;
    monitor.signal(libc::SIGTERM)?;
    monitor.wait_exit()?;
    let line = &monitor.metrics()?[0];
    let put = &line["put_api_requests"];
    assert_eq!(
        (&put["machine_cfg_count"], &put["machine_cfg_fails"]),
        (&json!(3), &json!(2))
    );
    assert_eq!(line["deprecated_api"]["deprecated_http_api_calls"], 1);
    Ok(())
}

#[test]
fn lines_name_the_instance_and_the_users_properties_when_asked() -> Result {
    let monitor = MonitorBuilder::new("names")?.args(["--id", "vm-7"]).start()?;
    let path = monitor.dir().join("m");
    let body =
        json!({"metrics_path": path, "emit_id": true, "properties": {"rack": "a", "zone": "1"}, "new": 1});
    monitor.put("/metrics", &body)?.success()?;
    monitor.signal(libc::SIGTERM)?;
    monitor.wait_exit()?;
    let line: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    assert_eq!(line["id"], "vm-7");
    assert_eq!(line["properties"], json!({"rack": "a", "zone": "1"}));
    assert_schema(&line);
    Ok(())
}

#[test]
fn properties_are_names_and_texts() -> Result {
    let monitor = MonitorBuilder::new("names")?.start()?;
    let path = monitor.dir().join("m");
    let body = json!({"metrics_path": path, "properties": {"rack": 1}});
    monitor.put("/metrics", &body)?.assert_refused(&["invalid type"]);
    assert!(!path.exists());
    Ok(())
}

#[test]
fn a_process_that_a_signal_kills_leaves_a_line_that_says_so() -> Result {
    for (signal, code, group, name) in [
        (libc::SIGHUP, 156, "signals", "sighup"),
        (libc::SIGSEGV, 150, "signals", "sigsegv"),
        (libc::SIGBUS, 149, "signals", "sigbus"),
        (libc::SIGILL, 157, "signals", "sigill"),
        (libc::SIGXCPU, 154, "signals", "sigxcpu"),
        (libc::SIGXFSZ, 151, "signals", "sigxfsz"),
    ] {
        let monitor = MonitorBuilder::new("last")?.metrics().start()?;
        monitor.signal(signal)?;
        assert_eq!(monitor.wait_exit()?, code);
        let lines = monitor.metrics()?;
        let line = &lines[0];
        assert_schema(line);
        assert_eq!((lines.len(), &line[group][name]), (1, &json!(1)), "{name}");
        let deaths = ["sigbus", "sighup", "sigill", "sigsegv", "sigxcpu", "sigxfsz"];
        let told: u64 = deaths
            .iter()
            .filter_map(|name| line["signals"][name].as_u64())
            .sum();
        assert_eq!(
            told + line["seccomp"]["num_faults"].as_u64().unwrap_or(0),
            1,
            "{line}"
        );
    }
    Ok(())
}

/// Samples by name and labels, and the type of each family.
#[derive(Debug, Default)]
struct Text {
    samples: BTreeMap<String, f64>,
    types: BTreeMap<String, String>,
}

/// Reads the text as Prometheus does; panics on what is not its format.
#[track_caller]
fn parse(text: &str) -> Text {
    let mut parsed = Text::default();
    let mut family = String::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap_or_default();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            family = name.into();
            // A family is declared once, so its samples stand together.
            assert_eq!(parsed.types.insert(name.into(), kind.into()), None, "{line}");
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap_or_default();
        let name = sample.split('{').next().unwrap_or_default();
        let suffix = name.strip_prefix(&*family);
        let of_histogram = matches!(suffix, Some("_bucket" | "_sum" | "_count"));
        let is_histogram = parsed.types.get(&family).is_some_and(|kind| kind == "histogram");
        assert!(
            if is_histogram {
                of_histogram
            } else {
                suffix == Some("")
            },
            "{line}"
        );
        assert!(
            name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_'),
            "{line}"
        );
        let value = value.parse().unwrap_or(f64::NAN);
        assert!(value >= 0.0, "{line}");
        assert_eq!(parsed.samples.insert(sample.into(), value), None, "{line}");
    }
    parsed
}

fn scrape(monitor: &Monitor) -> Result<Text> {
    let answer = monitor.get("/metrics")?.success()?;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4"));
    Ok(parse(&answer.body))
}

#[test]
fn prometheus_can_read_metrics_before_the_start() -> Result {
    let monitor = MonitorBuilder::new("text")?.args(["--id", "vm-1"]).start()?;
    let text = scrape(&monitor)?;
    assert_eq!(text.samples[r#"mayfly_state{state="Not started"}"#], 1.0);
    assert_eq!(text.samples[r#"mayfly_state{state="Running"}"#], 0.0);
    assert!(
        text.samples
            .keys()
            .any(|name| name.starts_with(r#"mayfly_info{id="vm-1",version=""#))
    );
    assert_eq!(text.samples["mayfly_uart_write_count_total"], 0.0);
    assert_eq!(text.samples["mayfly_entropy_entropy_bytes_total"], 0.0);
    assert_eq!(text.types["mayfly_vcpu_exit_io_in_total"], "counter");
    assert_eq!(text.types["mayfly_latencies_us_pause_vm"], "gauge");
    assert!(!text.types.contains_key("mayfly_block_read_count_total"));
    Ok(())
}

#[test]
fn prometheus_sees_every_drive_by_its_id() -> Result {
    let (vm, scratch) = machine("drives", &TinyKernel::new().print("up\n").halt())?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = up(vm
        .drive(Drive::new("one", &image).read_only())
        .drive(Drive::new("two", &image).read_only()))?;
    let text = scrape(&vm)?;
    for drive in ["one", "two"] {
        assert_eq!(
            text.samples[&format!(r#"mayfly_block_read_count_total{{drive="{drive}"}}"#)],
            0.0
        );
        let bucket = format!(r#"mayfly_block_flush_seconds_bucket{{drive="{drive}",le="+Inf"}}"#);
        assert_eq!(text.samples[&bucket], 0.0);
    }
    assert_eq!(text.types["mayfly_block_read_seconds"], "histogram");
    assert_eq!(text.samples["mayfly_uart_write_count_total"], 3.0);
    assert_eq!(text.samples[r#"mayfly_state{state="Running"}"#], 1.0);
    Ok(())
}

#[test]
fn reading_resets_nothing_and_a_line_neither() -> Result {
    let (vm, _scratch) = machine("reading", &TinyKernel::new().print("up\n").halt())?;
    let vm = up(vm)?;
    scrape(&vm)?;
    vm.action("FlushMetrics")?;
    let text = scrape(&vm)?;
    assert_eq!(text.samples["mayfly_uart_write_count_total"], 3.0);
    assert_eq!(vm.metrics()?[0]["uart"]["write_count"], 3);
    Ok(())
}

#[test]
fn requests_are_timed_by_kind_however_they_end() -> Result {
    let monitor = MonitorBuilder::new("times")?.start()?;
    monitor.get("/version")?;
    monitor.get("/version/x")?;
    monitor.put("/machine-config", &json!({"vcpu_count": 0, "mem_size_mib": 1}))?;
    monitor.get("/made/up")?;
    monitor.get("/made-up-too")?;
    let text = scrape(&monitor)?;
    let count = |method: &str, resource: &str| {
        let name = format!(r#"mayfly_api_request_seconds_count{{method="{method}",resource="{resource}"}}"#);
        text.samples.get(&name).copied()
    };
    assert_eq!(count("GET", "version"), Some(2.0));
    assert_eq!(count("PUT", "machine-config"), Some(1.0));
    assert_eq!(count("GET", "other"), Some(2.0));
    let buckets: Vec<_> = text
        .samples
        .iter()
        .filter(|(name, _)| name.contains(r#"_bucket{method="GET",resource="version""#))
        .collect();
    assert_eq!(buckets.len(), 25);
    let sum = text.samples[r#"mayfly_api_request_seconds_sum{method="GET",resource="version"}"#];
    assert!(sum > 0.0 && sum < 60.0, "{sum}");
    Ok(())
}
