//! A config file, section by section: applied, or only checked.

use std::path::PathBuf;

use super::{ControlError, Controller, configure_logger};
use crate::api::Action;
use crate::config::{self, VmConfig};
use crate::logger::check_sink;
use crate::rehearsal::rehearse;

/// A section of a config file was refused.
#[derive(Debug, thiserror::Error)]
#[error("section '{section}' of the config file")]
pub struct SectionError {
    section: &'static str,
    source: ControlError,
}

fn in_section(section: &'static str) -> impl Fn(ControlError) -> SectionError {
    move |source| SectionError { section, source }
}

impl Controller {
    /// Applies a config file wholly, and starts its machine.
    pub fn start_from(&mut self, config: VmConfig) -> Result<(), Box<dyn std::error::Error>> {
        if let Some(logger) = &config.logger {
            configure_logger(logger).map_err(in_section("logger"))?;
        }
        if let Some(metrics) = &config.metrics {
            self.set_metrics(metrics.clone()).map_err(in_section("metrics"))?;
        }
        self.configure(config)?;
        self.handle(Action::InstanceStart)?;
        Ok(())
    }

    /// Checks a config file without a machine: whether each section can be applied, what it names can be opened, and
    /// kernel, initrd and devices have room. It works without KVM, writes no file and leaves nothing behind. `log` and
    /// `metrics` are the files that the command line names.
    pub fn check(
        &mut self,
        mut config: VmConfig,
        (log, metrics): (Option<PathBuf>, Option<PathBuf>),
    ) -> Result<(), Box<dyn std::error::Error>> {
        if metrics.is_some() && config.metrics.is_some() {
            return Err(in_section("metrics")(ControlError::MetricsTwice).into());
        }
        for (section, path) in [("Logger", log), ("Metrics", metrics)] {
            path.map_or(Ok(()), |path| check_path(section, path))?;
        }
        let log = config.logger.take().and_then(|logger| logger.log_path);
        let metrics = config.metrics.take().map(|metrics| metrics.metrics_path);
        let serial = config.serial.as_mut().and_then(|s| s.serial_out_path.take());
        let sinks = [
            ("logger", "Logger", log),
            ("metrics", "Metrics", metrics),
            ("serial", "Serial", serial),
        ];
        for (key, section, path) in sinks {
            let checked = path.map_or(Ok(()), |path| check_path(section, path));
            checked.map_err(in_section(key))?;
        }
        self.configure(config)?;
        rehearse(self.any_config(), &self.instance.settings)?;
        Ok(())
    }

    /// Applies the sections that describe the machine.
    fn configure(&mut self, config: VmConfig) -> Result<(), SectionError> {
        let devices = config.devices();
        let mut put = |section, action| self.handle(action).map(drop).map_err(in_section(section));
        put("machine-config", Action::PutMachineConfig(config.machine_config))?;
        if let Some(source) = config.cpu_config {
            let template = source
                .load()
                .map_err(|error| in_section("cpu-config")(error.into()))?;
            put(
                "cpu-config",
                Action::PutCpuConfig(Box::new(template.into_owned())),
            )?;
        }
        put("boot-source", Action::PutBootSource(config.boot_source))?;
        for device in devices {
            let section = config::section(device.kind());
            put(section, Action::PutDevice(Box::new(device)))?;
        }
        if let Some(mmds) = config.mmds_config {
            put("mmds-config", Action::PutMmdsConfig(mmds))?;
        }
        config
            .serial
            .map_or(Ok(()), |serial| put("serial", Action::PutSerial(serial)))
    }
}

/// Sees whether lines could be appended to a file, which is not made.
fn check_path(section: &'static str, path: PathBuf) -> Result<(), ControlError> {
    check_sink(&path).map_err(|source| ControlError::Sink {
        section,
        path,
        source,
    })
}
