// Preloaded into NNI's manager (NODE_OPTIONS="--require=..."): a trial runs the parameters that the manager keeps for it.
// Place: nni_node/training_service/v3/compat.js, `this.parameters.shift()`, in NNI 3.0 (services local and remote): trials get
// parameters in the order in which they ask, the database, the tuner's `trial_end` and a resumed trial those by submission.
const Module = require("module");

const load = Module._load;

Module._load = function (request, ...rest) {
  const loaded = load.call(this, request, ...rest);
  if (request.endsWith("training_service/v3/compat")) pair(loaded.V3asV1.prototype);
  return loaded;
};

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
