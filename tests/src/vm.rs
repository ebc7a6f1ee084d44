//! A test's machine: what it is to be, and then the running one.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::RawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};

use crate::environment::{count_guest, require_fast_kvm, require_kvm};
use crate::guest::{Dialogue, Guest};
use crate::isolation::become_user;
use crate::jail::Jail;
use crate::monitor::{LOG, SOCKET};
use crate::{Drive, GuestImage, Monitor, MonitorBuilder, Net, Pmem, Result, Scratch};

/// Arguments for the guest images: a quiet console with the agent on it, and resets that end the machine.
const BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=-1 quiet mayfly.agent";

/// The section of memory that is plugged in. Only this one has another name in the API.
const MEMORY_HOTPLUG: &str = "memory-hotplug";

/// How the monitor learns what the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Configure {
    Api,
    File,
    FileOnly,
}

/// Describes a machine. Unless told otherwise it has 1 vCPU and 128 MiB, boots the guest images' kernel with their
/// initramfs, and is configured over the API.
#[derive(Debug, Clone)]
pub struct TestVm {
    name: String,
    args: Vec<String>,
    configure: Configure,
    machine: Map<String, Value>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    boot_args: String,
    drives: Vec<Drive>,
    nets: Vec<Net>,
    pmem: Vec<Pmem>,
    sections: Map<String, Value>,
    inherited: Option<(Arc<File>, RawFd)>,
    user: Option<u32>,
}

impl TestVm {
    /// A machine; the name is for messages.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            args: Vec::new(),
            configure: Configure::Api,
            machine: Map::from_iter([
                ("vcpu_count".to_owned(), json!(1)),
                ("mem_size_mib".to_owned(), json!(128)),
            ]),
            kernel: None,
            initrd: None,
            boot_args: BOOT_ARGS.into(),
            drives: Vec::new(),
            nets: Vec::new(),
            pmem: Vec::new(),
            sections: Map::new(),
            inherited: None,
            user: None,
        }
    }

    /// The number of vCPUs.
    pub fn vcpus(self, count: u8) -> Self {
        self.machine("vcpu_count", json!(count))
    }

    /// The size of memory in MiB.
    pub fn mem_mib(self, size: usize) -> Self {
        self.machine("mem_size_mib", json!(size))
    }

    /// Any value of the machine config.
    pub fn machine(mut self, key: &str, value: Value) -> Self {
        self.machine.insert(key.into(), value);
        self
    }

    /// Another kernel.
    pub fn kernel(mut self, path: impl AsRef<Path>) -> Self {
        self.kernel = Some(path.as_ref().into());
        self
    }

    /// Adds to the kernel's command line.
    pub fn boot_arg(mut self, arg: &str) -> Self {
        self.boot_args.push(' ');
        self.boot_args.push_str(arg);
        self
    }

    /// Adds a disk.
    pub fn drive(mut self, drive: Drive) -> Self {
        self.drives.push(drive);
        self
    }

    /// Adds a network card.
    pub fn net(mut self, net: Net) -> Self {
        self.nets.push(net);
        self
    }

    /// Adds a file as memory.
    pub fn pmem(mut self, pmem: Pmem) -> Self {
        self.pmem.push(pmem);
        self
    }

    /// Adds memory that can be plugged in: so many MiB at most.
    pub fn memory_hotplug(self, total_mib: u32) -> Self {
        self.section(MEMORY_HOTPLUG, json!({"total_size_mib": total_mib}))
    }

    /// Adds the entropy device.
    pub fn entropy(self) -> Self {
        self.section("entropy", json!({}))
    }

    /// Sends the console's output to a file.
    pub fn serial_file(self, path: &Path) -> Self {
        self.section("serial", json!({"serial_out_path": path}))
    }

    /// Any other section of the config file, which is also the name of an API resource.
    pub fn section(mut self, name: &str, value: Value) -> Self {
        self.sections.insert(name.into(), value);
        self
    }

    /// Passes an open file on to the monitor, under this number.
    pub fn inherit(mut self, file: File, number: RawFd) -> Self {
        self.inherited = Some((Arc::new(file), number));
        self
    }

    /// Runs the monitor as this user, who has no rights but that to use KVM and taps; not together with an open file.
    pub fn user(mut self, user: u32) -> Self {
        self.user = Some(user);
        self
    }

    /// Adds command line arguments of the monitor.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Puts the devices on virtio-mmio.
    pub fn mmio(self) -> Self {
        self.args(["--no-pci"])
    }

    /// Configures it by a config file, with an API socket beside.
    pub fn config_file(mut self) -> Self {
        self.configure = Configure::File;
        self
    }

    /// Configures it by a config file only.
    pub fn config_file_without_api(mut self) -> Self {
        self.configure = Configure::FileOnly;
        self
    }

    /// The machine as the content of a config file.
    pub fn config(&self) -> Result<Value> {
        let mut config = json!({
            "machine-config": self.machine,
            "boot-source": self.boot_source()?,
            "drives": self.drives.iter().cloned().map(Drive::into_json).collect::<Vec<_>>(),
            "network-interfaces": self.nets.iter().cloned().map(Net::into_json).collect::<Vec<_>>(),
            "pmem": self.pmem.iter().cloned().map(Pmem::into_json).collect::<Vec<_>>(),
        });
        for (name, value) in &self.sections {
            config[name] = value.clone();
        }
        Ok(config)
    }

    fn boot_source(&self) -> Result<Value> {
        let (kernel, initrd) = match &self.kernel {
            Some(kernel) => (kernel.clone(), self.initrd.clone()),
            None => (GuestImage::Vmlinux.path()?, Some(GuestImage::Initramfs.path()?)),
        };
        Ok(json!({"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": self.boot_args}))
    }

    /// Another initial RAM disk.
    pub fn initrd(mut self, path: impl AsRef<Path>) -> Self {
        self.initrd = Some(path.as_ref().into());
        self
    }

    /// Starts the machine, and waits until its Linux runs commands.
    pub fn boot(self) -> Result<Vm> {
        require_fast_kvm()?;
        let name = self.name.clone();
        let vm = self.start()?;
        vm.guest().wait_ready()?;
        count_guest(&name)?;
        Ok(vm)
    }

    /// Starts the machine in a jail by one command with these options of the jailer, and waits until its Linux runs
    /// commands.
    pub fn boot_in(mut self, jail: &Jail, options: &[&str]) -> Result<Vm> {
        require_fast_kvm()?;
        if self.kernel.is_none() {
            self.kernel = Some(jail.copy(&GuestImage::Vmlinux.path()?)?);
            self.initrd = Some(jail.copy(&GuestImage::Initramfs.path()?)?);
        }
        let scratch = Scratch::new(&self.name)?;
        let log = jail.dir().join(LOG);
        std::fs::write(&log, "")?;
        jail.give(&log)?;
        // Where a monitor without a jail has them.
        symlink(&log, scratch.join(LOG))?;
        symlink(jail.socket(), scratch.join(SOCKET))?;
        let vm = self.section("logger", json!({"log_path": log}));
        std::fs::write(jail.dir().join("vm.json"), vm.config()?.to_string())?;
        let mut command = jail.command(&["--config-file", "vm.json", "--import"]);
        command
            .args(options)
            .args(["--", "--api-sock", "/run/api.sock"])
            .args(&vm.args);
        let vm_name = vm.name;
        let vm = Vm {
            monitor: Monitor::new(scratch, command.stdin(Stdio::piped()).spawn()?),
            dialogue: Mutex::default(),
        };
        vm.guest().wait_ready()?;
        count_guest(&vm_name)?;
        Ok(vm)
    }

    /// Starts the machine, and does not wait for its guest.
    pub fn start(self) -> Result<Vm> {
        require_kvm()?;
        let monitor = match self.configure {
            Configure::Api => {
                let monitor = self.monitor()?.start()?;
                put_config(&monitor, &self.config()?)?;
                monitor.action("InstanceStart")?;
                monitor
            }
            Configure::File => self.with_config_file()?.start()?,
            Configure::FileOnly => self
                .with_config_file()?
                .args(["--no-api"])
                .without_api_socket()
                .spawn()?,
        };
        Ok(Vm {
            monitor,
            dialogue: Mutex::default(),
        })
    }

    fn monitor(&self) -> Result<MonitorBuilder> {
        let builder = MonitorBuilder::new(&self.name)?.args(self.args.clone()).metrics();
        Ok(match (&self.inherited, self.user) {
            (Some((file, number)), _) => builder.inherit(Arc::clone(file), *number),
            (None, Some(user)) => builder.open_to_all()?.prepare(move || become_user(user)),
            (None, None) => builder,
        })
    }

    fn with_config_file(&self) -> Result<MonitorBuilder> {
        let builder = self.monitor()?;
        std::fs::write(builder.dir().join("config.json"), self.config()?.to_string())?;
        Ok(builder.args(["--config-file", "config.json"]))
    }
}

/// Configures a machine over the API, request by request.
fn put_config(monitor: &Monitor, config: &Value) -> Result {
    for (section, value) in config.as_object().into_iter().flatten() {
        let id_key = match section.as_str() {
            "drives" => "drive_id",
            "network-interfaces" => "iface_id",
            "pmem" => "id",
            section => {
                let path = if section == MEMORY_HOTPLUG {
                    "hotplug/memory"
                } else {
                    section
                };
                monitor.put(&format!("/{path}"), value)?.success()?;
                continue;
            }
        };
        for device in value.as_array().into_iter().flatten() {
            let id = device[id_key].as_str().unwrap_or_default();
            monitor.put(&format!("/{section}/{id}"), device)?.success()?;
        }
    }
    Ok(())
}

/// A machine that was started; dereferences to its monitor. It is killed when dropped.
#[derive(Debug)]
pub struct Vm {
    monitor: Monitor,
    dialogue: Mutex<Dialogue>,
}

impl Vm {
    /// Its Linux.
    pub fn guest(&self) -> Guest<'_> {
        Guest::new(&self.monitor, &self.dialogue)
    }

    /// Lets the guest use so many MiB of its memory and free them again, which the host does not see by itself.
    /// Gives the bytes of memory that the monitor had in between.
    pub fn use_and_free(&self, mib: u64) -> Result<u64> {
        let before = self.resident_bytes()?;
        self.guest().check(&format!(
            "mkdir -p /ram && mount -t tmpfs -o size=90% none /ram && dd if=/dev/zero of=/ram/file bs=1M count={mib}"
        ))?;
        // The guest may tell the host as soon as it is free.
        let after = self.resident_bytes()?;
        // Up to 44 MiB were the guest's already.
        assert!(after > before + ((mib - 44) << 20), "{before} {after}");
        self.guest().check("umount /ram")?;
        Ok(after)
    }
}

impl Deref for Vm {
    type Target = Monitor;

    fn deref(&self) -> &Monitor {
        &self.monitor
    }
}
