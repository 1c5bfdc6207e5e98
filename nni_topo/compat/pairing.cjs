// Preloaded into NNI's manager (NODE_OPTIONS="--require=..."): a trial runs the parameters that the manager records for it, a resumed
// experiment repeats no parameters, trials ended by an assessor are reported as early-stopped, and a tuner may take a minute to start.
// Places in NNI 3.0: nni_node/training_service/v3/compat.js (local and remote), nni_node/core/nnimanager.js, tuner_command_channel.js.
const Module = require("module");
const { setTimeout: wait } = require("timers/promises");

const load = Module._load;
const patched = new Set();

Module._load = function (request, ...rest) {
  const loaded = load.call(this, request, ...rest);
  if (request.endsWith("training_service/v3/compat")) {
    once(loaded.V3asV1.prototype, (prototype) => {
      pair(prototype);
      noteEarlyStops(prototype);
    });
  }
  if (request === "core/nnimanager") {
    once(loaded.NNIManager.prototype, (prototype) => {
      remember(prototype);
      awaitTuner(prototype);
    });
  }
  return loaded;
};

function once(prototype, patch) {
  if (!patched.has(prototype)) patch(prototype);
  patched.add(prototype);
}

// Cause: `this.parameters.shift()` gives parameters to trials in the order in which they ask; the database, the tuner's `trial_end`
// and resumed trials assume the order of submission.
function pair(prototype) {
  const start = prototype.start;

  prototype.start = function () {
    const { v3, parameters, allocatedParameters } = this;
    const { createTrial, onRequestParameter } = v3;
    let creation = Promise.resolve();

    // one trial is created at a time, and its parameters are first in the queue; a resumed trial already has its parameters
    v3.createTrial = (...args) => {
      creation = createTrial.apply(v3, args).then((id) => {
        if (id !== null && parameters.length > 0) allocatedParameters.set(id, parameters.shift());
        return id;
      });
      return creation;
    };

    // a trial may ask before its creation has returned its id
    v3.onRequestParameter = (callback) =>
      onRequestParameter.call(v3, async (id) => {
        if (!allocatedParameters.has(id)) await creation.catch(() => {});
        await callback(id);
      });

    return start.call(this);
  };
}

// Cause: `cancelTrialJob` records that an assessor ends a trial only after the trial has ended; a trial that ends at once counts as
// canceled by the user.
function noteEarlyStops(prototype) {
  const { cancelTrialJob } = prototype;

  prototype.cancelTrialJob = function (id, isEarlyStopped) {
    if (this.trialJobs[id] !== undefined) this.trialJobs[id].isEarlyStopped = Boolean(isEarlyStopped);
    return cancelTrialJob.call(this, id, isEarlyStopped);
  };
}

// Cause: a resumed experiment continues from `addRecoveredTrialJob`. NNI's tuners start anew and learn finished results only, so they
// propose parameters of running trials again; and some sequence numbers are given twice.
function remember(prototype) {
  const { addRecoveredTrialJob, onTunerCommand } = prototype;

  prototype.addRecoveredTrialJob = function (jobs) {
    // a trial that was to be resumed when the manager was killed; NNI counts it as ended
    for (const job of jobs) if (job.status === "ADD_RESUMED") job.status = "WAITING";
    const count = addRecoveredTrialJob.call(this, jobs);
    const proposals = jobs.flatMap((job) => (job.hyperParameters ?? []).slice(0, 1)).map((text) => JSON.parse(text));
    this.trialDataForResume = JSON.stringify(proposals);
    this.experimentProfile.nextSequenceId = Math.max(-1, ...jobs.map((job) => job.sequenceId ?? -1)) + 1;
    // skips trials that a user added, which have no id, and those of Hyperband and BOHB, whose ids are strings: they plan in brackets
    this.tried = proposals.filter((each) => typeof each.parameter_id === "number").map(canonical);
    return count;
  };

  prototype.onTunerCommand = async function (type, content) {
    const place = type === "TR" && this.tried ? this.tried.indexOf(canonical(JSON.parse(content))) : -1;
    if (place < 0) return onTunerCommand.call(this, type, content);
    // each old trial cancels one proposal; a proposal that the tuner repeats on purpose runs
    this.tried.splice(place, 1);
    const end = { trial_job_id: "", event: "SYS_CANCELED", hyper_params: content };
    this.dispatcher.sendCommand("EN", JSON.stringify(end));
    this.requestTrialJobs(1);
  };
}

// Cause: `TunerServer.init` gives a tuner ten seconds; on a busy machine a tuner with many imports needs longer.
function awaitTuner(prototype) {
  const run = prototype.run;

  prototype.run = async function () {
    for (let second = 0; second < 50 && this.dispatcher.connect?.settled === false && alive(this.dispatcherPid); second++) await wait(1000);
    return run.call(this);
  };
}

function alive(pid) {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

function canonical(proposal) {
  const sorted = (_, value) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).sort(([one], [other]) => (one < other ? -1 : 1)))
      : value;
  return JSON.stringify(proposal.parameters, sorted);
}
