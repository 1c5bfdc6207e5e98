// Preloaded into NNI's manager (NODE_OPTIONS="--require=..."): a trial runs the parameters that the manager keeps for it, a resumed
// experiment tries none of them twice, what an assessor ends is told as such, and a tuner may take a minute to start. In NNI 3.0:
// nni_node/training_service/v3/compat.js (services local and remote), nni_node/core/nnimanager.js, tuner_command_channel.js.
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

// `this.parameters.shift()`: trials get parameters in the order in which they ask, the database, the tuner's `trial_end` and a
// resumed trial those by submission.
function pair(prototype) {
  const start = prototype.start;

  prototype.start = function () {
    const { v3, parameters, allocatedParameters } = this;
    const { createTrial, onRequestParameter } = v3;
    let creation = Promise.resolve();

    // one trial is created at a time, with its parameters at the head of the queue; a resumed one has its own already
    v3.createTrial = (...args) => {
      creation = createTrial.apply(v3, args).then((id) => {
        if (id !== null && parameters.length > 0) allocatedParameters.set(id, parameters.shift());
        return id;
      });
      return creation;
    };

    // a trial may ask before its creation is known
    v3.onRequestParameter = (callback) =>
      onRequestParameter.call(v3, async (id) => {
        if (!allocatedParameters.has(id)) await creation.catch(() => {});
        await callback(id);
      });

    return start.call(this);
  };
}

// `cancelTrialJob`: notes that an assessor ends a trial after it has waited for the trial's end, where a trial that ends at once
// counts as canceled by the user.
function noteEarlyStops(prototype) {
  const { cancelTrialJob } = prototype;

  prototype.cancelTrialJob = function (id, isEarlyStopped) {
    if (this.trialJobs[id] !== undefined) this.trialJobs[id].isEarlyStopped = Boolean(isEarlyStopped);
    return cancelTrialJob.call(this, id, isEarlyStopped);
  };
}

// `addRecoveredTrialJob`: what a resumed experiment goes on with. NNI's tuners begin anew and learn of results alone, so that they
// propose what is running once more; numbers begin after the trials that are taken up again, and are given out twice.
function remember(prototype) {
  const { addRecoveredTrialJob, onTunerCommand } = prototype;

  prototype.addRecoveredTrialJob = function (jobs) {
    // a trial to be taken up again, whose manager was killed before it was: NNI counts it as ended
    for (const job of jobs) if (job.status === "ADD_RESUMED") job.status = "WAITING";
    const count = addRecoveredTrialJob.call(this, jobs);
    const proposals = jobs.flatMap((job) => (job.hyperParameters ?? []).slice(0, 1)).map((text) => JSON.parse(text));
    this.trialDataForResume = JSON.stringify(proposals);
    this.experimentProfile.nextSequenceId = Math.max(-1, ...jobs.map((job) => job.sequenceId ?? -1)) + 1;
    // neither what a user has added, which has no number, nor Hyperband's and BOHB's, whose numbers are words: they plan in brackets
    this.tried = proposals.filter((each) => typeof each.parameter_id === "number").map(canonical);
    return count;
  };

  prototype.onTunerCommand = async function (type, content) {
    const place = type === "TR" && this.tried ? this.tried.indexOf(canonical(JSON.parse(content))) : -1;
    if (place < 0) return onTunerCommand.call(this, type, content);
    // each trial stands for one proposal: what a tuner repeats of its own will is run
    this.tried.splice(place, 1);
    const end = { trial_job_id: "", event: "SYS_CANCELED", hyper_params: content };
    this.dispatcher.sendCommand("EN", JSON.stringify(end));
    this.requestTrialJobs(1);
  };
}

// `TunerServer.init`: gives a tuner ten seconds, which one that imports much needs longer than on a busy machine.
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
