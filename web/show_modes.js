// Show Modes: the text of its last run, on the node.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

app.registerExtension({
    name: "int8_compile.ShowModes",
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (nodeData.name !== "ShowModes") return;
        const { onNodeCreated, onExecuted } = nodeType.prototype;
        nodeType.prototype.onNodeCreated = function () {
            onNodeCreated?.apply(this, arguments);
            const { widget } = ComfyWidgets.STRING(this, "shown", ["STRING", { multiline: true }], app);
            widget.inputEl.readOnly = true;
            // Neither in the saved workflow nor in the prompt: it is no input.
            widget.serialize = widget.options.serialize = false;
        };
        nodeType.prototype.onExecuted = function (message) {
            onExecuted?.apply(this, arguments);
            this.widgets.find((widget) => widget.name === "shown").value = message.text[0];
        };
    },
});
